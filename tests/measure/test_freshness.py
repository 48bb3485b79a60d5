"""The gate: records of other sources, broken records and a broken table stop it, with file and field."""

import json
import shutil
import subprocess

import pytest

from mla_kernels.measure import provenance
from mla_kernels.measure.__main__ import main
from mla_kernels.measure.freshness import check_fresh, problems
from mla_kernels.measure.hardware import HARDWARE, load_hardware
from mla_kernels.measure.records import RecordError, Source, save_record


def entry(template, config, **fields):
    """What a record says of a kernel of this tree; ``fields`` change it."""
    from mla_kernels.compiler import compile_options, source_digest

    own = {
        "name": config.name,
        "source": config.source,
        "digest": source_digest(config.source),
        "options": list(compile_options(config)),
    }
    return template.model_copy(update=own | fields)


@pytest.fixture
def make_fresh(make_record):
    """A record of the kernels of this tree; ``fields`` change the first of them."""
    from mla_kernels.decode import shipped_configs
    from mla_kernels.launch import STREAM_READ

    def make(**fields):
        template = make_record().source.kernels[0]
        kernels = [entry(template, config) for config in (*shipped_configs(), STREAM_READ)]
        kernels[0] = kernels[0].model_copy(update=fields)
        return make_record(source=Source(kernels=kernels))

    return make


@pytest.fixture
def data(tmp_path, make_fresh):
    """A data folder with one fresh record and the hardware table."""
    save_record(make_fresh(), tmp_path / "h200" / "roofline.json")
    shutil.copy(HARDWARE, tmp_path / "hardware.json")
    return tmp_path


def test_fresh(make_fresh):
    check_fresh(make_fresh(), "r.json")


@pytest.mark.parametrize(
    ("fields", "found"),
    [({"digest": "0" * 64}, "when measured and is"), ({"source": "gone.cu"}, "no longer in this tree")],
)
def test_stale(make_fresh, fields, found):
    with pytest.raises(RecordError, match=found) as caught:
        check_fresh(make_fresh(**fields), "data/h200/roofline.json")
    message = str(caught.value)
    assert message.startswith("data/h200/roofline.json: source.kernels.0.digest: ")
    assert "make record" in message


def test_other_text_of_the_same_machine_code_is_fresh(make_fresh):
    from mla_kernels.compiler import compile_kernel
    from mla_kernels.decode import shipped_configs

    code = compile_kernel(shipped_configs()[0]).sha256
    check_fresh(make_fresh(digest="0" * 64, cubin_sha256=code), "r.json")
    with pytest.raises(RecordError, match="does not compile to the code that was measured"):
        check_fresh(make_fresh(digest="0" * 64, cubin_sha256="1" * 64), "r.json")


@pytest.fixture
def measured_elsewhere(tmp_path, monkeypatch, make_record):
    """A record of stream_read.cu at a commit where ``before`` read ``after`` in it."""
    from mla_kernels.compiler import CUDA_DIR, compile_kernel
    from mla_kernels.launch import STREAM_READ

    def measure(before, after):
        sources = tmp_path / "mla_kernels" / "cuda"
        shutil.copytree(CUDA_DIR, sources)
        text = (sources / STREAM_READ.source).read_text()
        assert text.count(before) == 1
        (sources / STREAM_READ.source).write_text(text.replace(before, after))
        for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "as it was measured"]):
            who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
            subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True)
        monkeypatch.setattr(provenance, "ROOT", tmp_path)
        record, code = make_record(), compile_kernel(STREAM_READ, sources).sha256
        kernel = entry(record.source.kernels[0], STREAM_READ, digest="0" * 64, cubin_sha256=code)
        run = record.run.model_copy(update={"commit": provenance._git("rev-parse", "HEAD")})
        return record.model_copy(update={"source": Source(kernels=[kernel]), "run": run})

    return measure


STREAMED = 'extern "C" __global__'
STALE_CODE = "does not compile to the code that was measured"


def test_the_same_instructions_are_fresh_beside_another_constant(measured_elsewhere):
    record = measured_elsewhere(STREAMED, f"constexpr int kUnread = 7;\n\n{STREAMED}")
    check_fresh(record, "r.json")
    lost = record.run.model_copy(update={"commit": "0" * 40})
    with pytest.raises(RecordError, match=STALE_CODE):
        check_fresh(record.model_copy(update={"run": lost}), "r.json")


def test_other_instructions_are_stale(measured_elsewhere):
    with pytest.raises(RecordError, match=STALE_CODE):
        check_fresh(measured_elsewhere("folded == 0xffffffffu", "folded == 0xfffffffeu"), "r.json")


def test_a_cubin_that_its_commit_does_not_give_is_stale(measured_elsewhere):
    record = measured_elsewhere(STREAMED, f"constexpr int kUnread = 7;\n\n{STREAMED}")
    kernel = record.source.kernels[0].model_copy(update={"cubin_sha256": "1" * 64})
    with pytest.raises(RecordError, match=STALE_CODE):
        check_fresh(record.model_copy(update={"source": Source(kernels=[kernel])}), "r.json")


def test_a_kernel_that_serves_a_point_must_be_in_the_record(data, make_fresh, make_point):
    record = make_fresh()
    serving = [k for k in record.source.kernels if not k.name.endswith("-pieces")]
    paged = make_point().workload.model_copy(update={"page_size": 16})
    for kernels, missing in ((record.source.kernels, False), (serving, True)):
        points = [make_point(workload=paged, us=float(100 + missing))]
        path = data / "h200" / "roofline.json"
        save_record(record.model_copy(update={"points": points, "source": Source(kernels=kernels)}), path)
        assert [p.field for p in problems(data)] == ["source.kernels"] * missing


def test_kernels_that_came_later_do_not_make_a_record_stale(data, make_fresh):
    record = make_fresh()
    kernels = [kernel for kernel in record.source.kernels if "tokens" not in kernel.name]
    path = data / "h200" / "roofline.json"
    save_record(record.model_copy(update={"source": Source(kernels=kernels)}), path)
    assert problems(data) == []


def test_a_record_without_kernels_is_not_fresh(make_record):
    with pytest.raises(RecordError, match=r"source\.kernels: is empty"):
        check_fresh(make_record(source=Source()), "r.json")


@pytest.mark.parametrize(
    "fields", [{"options": ["-arch=sm_90a", "-DMLA_ITEM_UNITS=7"]}, {"name": "decode_rows-bf16-65"}]
)
def test_other_options_are_another_kernel(data, make_fresh, fields):
    save_record(make_fresh(**fields), data / "h200" / "roofline.json")
    (problem,) = problems(data)
    assert problem.field == "source.kernels" and "was compiled with" in str(problem)


@pytest.fixture
def of_prefill(make_point, make_record):
    """A record of prefill at d 64, of every kernel for it but those whose name ``without`` says."""
    from mla_kernels.compiler import compile_options, source_digest
    from mla_kernels.measure.prefill_inputs import prefill
    from mla_kernels.prefill_tuning import shipped_prefill_configs

    def make(without=()):
        base = make_record().source.kernels[0]
        kernels = [
            base.model_copy(
                update={
                    "name": config.name,
                    "source": config.source,
                    "digest": source_digest(config.source),
                    "options": list(compile_options(config)),
                }
            )
            for config in shipped_prefill_configs()
            if config.name not in without
        ]
        point = make_point().model_copy(update={"workload": prefill(1, 64, 4, (64, 64))})
        return make_record(experiment="prefill", points=[point], source=Source(kernels=kernels))

    return make


def test_kernels_of_prefill_are_those_of_its_head_dims(data, of_prefill):
    from mla_kernels.measure.prefill_candidates import serving_names
    from mla_kernels.measure.prefill_inputs import prefill
    from mla_kernels.prefill_tuning import shipped_prefill_configs

    save_record(of_prefill(), data / "h200" / "prefill.json")
    assert problems(data) == []
    mine = serving_names(prefill(1, 64, 4, (64, 64)))
    assert mine and all("prefill-bf16-64x64-" in name for name in mine)
    others = {config.name for config in shipped_prefill_configs()} - mine
    save_record(of_prefill(without=others), data / "h200" / "prefill.json")
    assert problems(data) == []
    save_record(of_prefill(without=mine), data / "h200" / "prefill.json")
    (problem,) = problems(data)
    assert "was compiled with None when measured" in str(problem)


@pytest.fixture
def with_candidate(make_fresh, make_point):
    """A fresh record that also timed a variant, or has its kernel alone; ``options`` replace the kernel's."""
    from mla_kernels.compiler import compile_options
    from mla_kernels.measure.candidates import name_of, tuning_of

    def make(options=None, timed=True):
        name = name_of("ahead_boxes=1", rows=64)
        config = tuning_of(name).kernel_config("bf16")
        record = make_fresh()
        kernel = record.source.kernels[3].model_copy(
            update={"name": config.name, "options": options or list(compile_options(config))}
        )
        points = [make_point(name)] if timed else []
        return record.model_copy(
            update={"points": points, "source": Source(kernels=[*record.source.kernels, kernel])}
        )

    return make


def test_variants_that_were_timed_are_no_strangers(data, with_candidate):
    save_record(with_candidate(), data / "h200" / "tuning.json")
    assert problems(data) == []


@pytest.mark.parametrize("fields", [{"options": ["-arch=sm_90a"]}, {"timed": False}])
def test_variants_of_other_options_or_of_no_point_are(data, with_candidate, fields):
    save_record(with_candidate(**fields), data / "h200" / "tuning.json")
    (problem,) = problems(data)
    assert problem.field == "source.kernels" and "decode_rows-bf16-64+ahead_boxes=1" in str(problem)


def test_check_passes(data, capsys):
    assert main(["check", "--data", str(data)]) == 0
    assert "1 records are valid and fresh" in capsys.readouterr().out


def test_check_names_every_problem_and_exits_1(data, make_fresh, capsys):
    save_record(make_fresh(digest="0" * 64), data / "h200" / "stale.json")
    (data / "h200" / "torn.json").write_text('{"schema_version": 1, "exp')
    (data / "hardware.json").write_text('[{"name": "NVIDIA H200"}]')
    assert main(["check", "--data", str(data)]) == 1
    errors = capsys.readouterr().err
    assert f"{data}/h200/stale.json: source.kernels.0.digest: " in errors
    assert f"{data}/h200/torn.json: (file): is not whole JSON" in errors
    assert f"{data}/hardware.json: 0.memory_gb: " in errors
    assert "roofline.json" not in errors and len(problems(data)) == 3


def test_list_shows_experiments_and_records(data, capsys):
    (data / "h200" / "torn.json").write_text("")
    assert main(["list", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "bandwidth" in out and "roofline.json: NVIDIA H200, 2026-01-01, commit 0123456789, 1 points" in out
    assert "torn.json: unusable ((file): is empty)" in out


def test_a_misspelled_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["record", "rooflime"])
    assert caught.value.code == 2 and "unknown experiment rooflime" in capsys.readouterr().err


def test_recording_without_a_gpu_says_so(tmp_path, capsys):
    from mla_kernels.device import hopper_available

    if hopper_available():
        pytest.skip("this machine has a Hopper GPU")
    assert main(["record", "roofline", "--out", str(tmp_path)]) == 1
    assert "Hopper" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_hardware_table():
    cards = load_hardware()
    assert {"NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H800"} == set(cards)
    assert cards["NVIDIA H200"].bandwidth_tb_s == 4.8
    assert all(card.sources for card in cards.values())


@pytest.mark.parametrize(
    ("content", "field"),
    [('[{"name": "x", "colour": "red"}]', "0.memory_gb"), ("[1", "(file)"), ("{}", "(file)")],
)
def test_a_broken_hardware_table_names_its_field(tmp_path, content, field):
    (tmp_path / "hardware.json").write_text(content)
    with pytest.raises(RecordError) as caught:
        load_hardware(tmp_path / "hardware.json")
    assert caught.value.field == field


def test_the_hardware_table_takes_no_other_field(tmp_path):
    card = json.loads(HARDWARE.read_text())[0] | {"colour": "red"}
    (tmp_path / "hardware.json").write_text(json.dumps([card]))
    with pytest.raises(RecordError, match=r"0\.colour"):
        load_hardware(tmp_path / "hardware.json")
