"""The reader of Azure's traces, on files written here: both releases' forms, and every way to be broken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.serving import TraceError, read_azure

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
OF_2023 = [
    HEADER,
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
    "2023-11-16 18:15:51.2224670,879,55",
    "2023-11-16 18:16:01.6805900,91,16",
]
ROWS = [(0.0, 374, 44), (4.314579, 396, 109), (4.541877, 879, 55), (15.0, 91, 16)]


@pytest.fixture
def write(tmp_path):
    """Writes lines (or bytes) to a trace file and gives its path."""

    def write_trace(content, end="\n", encoding="utf-8"):
        path = tmp_path / "trace.csv"
        path.write_bytes(
            content if isinstance(content, bytes) else (end.join(content) + end).encode(encoding)
        )
        return path

    return write_trace


def rows(requests):
    return [(request.arrival_s, request.context_tokens, request.generated_tokens) for request in requests]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_line_ends_and_byte_order_marks_make_no_difference(write, end, encoding):
    assert rows(read_azure(write(OF_2023, end, encoding))) == ROWS
    assert rows(read_azure(write([*OF_2023, "", "  "], end, encoding))) == ROWS
    assert rows(read_azure(write(["", *OF_2023], end, encoding))) == ROWS


def test_the_last_line_may_have_no_end(write):
    assert rows(read_azure(write("\n".join(OF_2023).encode()))) == ROWS


@pytest.mark.parametrize(
    "zone", ["", "Z", " UTC", "+00:00", "+0000", "+00", " +00:00", "+05:30", "-0800", "-12"]
)
def test_zones_shift_all_alike(write, zone):
    times = ["2024-05-10 00:00:00.009930", "2024-05-10T00:00:00", "2024-05-11 00:00:01.5"]
    path = write([HEADER] + [f"{time}{zone},{i},7" for i, time in enumerate(times)])
    assert rows(read_azure(path)) == [(0.0, 1, 7), (0.00993, 0, 7), (86401.5, 2, 7)]


def test_times_of_different_zones_are_compared_in_utc(write):
    lines = ["2024-05-10 02:00:01+02:00,1,1", "2024-05-10 00:00:00,2,2", "2024-05-09 20:00:03-04:00,3,3"]
    assert rows(read_azure(write([HEADER, *lines]))) == [(0.0, 2, 2), (1.0, 1, 1), (3.0, 3, 3)]


def test_all_seven_digits_count(write):
    lines = [HEADER, "2023-11-16 18:15:46.6805901,1,1", "2023-11-16 18:15:46.6805900,2,2"]
    assert rows(read_azure(write(lines))) == [(0.0, 2, 2), (1e-7, 1, 1)]


def test_columns_are_found_by_name(write):
    lines = ["row,GeneratedTokens, TIMESTAMP,ContextTokens"]
    for i, line in enumerate(OF_2023[1:]):
        time, context, generated = line.split(",")
        lines.append(f'{i},"{generated}", {time}, {context}')
    assert rows(read_azure(write(lines))) == ROWS


def test_no_two_requests_share_text(write):
    requests = read_azure(write(OF_2023))
    ids = [segment.id for request in requests for segment in (*request.prompt, request.reply)]
    assert len(set(ids)) == 8 and all(request.conversation is None for request in requests)


tokens = st.integers(0, 10**5)


@given(
    trace=st.lists(st.tuples(st.integers(0, 10**8), tokens, tokens), min_size=1, max_size=30),
    window_s=st.one_of(st.none(), st.floats(1e-7, 12)),
    limit=st.one_of(st.none(), st.integers(1, 40)),
)
@settings(max_examples=80, deadline=None)
def test_unsorted_rows_windows_and_limits(tmp_path_factory, trace, window_s, limit):
    path = tmp_path_factory.mktemp("azure") / "trace.csv"  # one a case: hypothesis shares function fixtures
    lines = [HEADER]
    for ticks, context, generated in trace:  # ticks of 100 ns
        lines.append(f"2023-11-16 18:15:{46 + ticks // 10**7:02d}.{ticks % 10**7:07d},{context},{generated}")
    path.write_text("\n".join(lines))
    read = trace[:limit]
    first = min(ticks for ticks, _, _ in read)
    expected = sorted(((ticks - first, c, g) for ticks, c, g in read), key=lambda row: row[0])
    if window_s is not None:
        expected = [row for row in expected if row[0] * 100 < round(window_s * 1e9)]
    result = rows(read_azure(path, limit=limit, window_s=window_s))
    assert result == [(ticks * 100 / 1e9, c, g) for ticks, c, g in expected]


def test_a_window_excludes_its_end(write):
    assert rows(read_azure(write(OF_2023), window_s=15.0)) == ROWS[:3]
    assert rows(read_azure(write(OF_2023), window_s=15.0000001)) == ROWS


def test_nothing_after_the_limit_is_read(write):
    path = write([*OF_2023, "broken"])
    assert rows(read_azure(path, limit=4)) == ROWS
    with pytest.raises(TraceError):
        read_azure(path, limit=5)


TAKE_OUT = "or take the row out"
FETCH = "download the file again"


@pytest.mark.parametrize(
    ("line", "column", "found", "remedy"),
    [
        ("2023-11-16 18:15:47,12.5,3", "ContextTokens", "'12.5' is not a whole number", TAKE_OUT),
        ("2023-11-16 18:15:47,,3", "ContextTokens", "'' is not a whole number", TAKE_OUT),
        ("2023-11-16 18:15:47,1_000,3", "ContextTokens", "'1_000' is not a whole number", TAKE_OUT),
        ("2023-11-16 18:15:47,٣,3", "ContextTokens", "'٣' is not a whole number", TAKE_OUT),
        ("2023-11-16 18:15:47,3,nan", "GeneratedTokens", "'nan' is not a whole number", TAKE_OUT),
        ("2023-11-16 18:15:47,-3,4", "ContextTokens", "'-3' tokens are negative", "from 0"),
        ("2023-11-16 18:15:47,3,-44", "GeneratedTokens", "'-44' tokens are negative", "from 0"),
        ("2023-11-16 18:15:47,3,4294967296", "GeneratedTokens", "too many", "to 4294967295"),
        (f"2023-11-16 18:15:47,3,{'9' * 5000}", "GeneratedTokens", "too many", "to 4294967295"),
        ("16/11/2023 18:15,3,4", "TIMESTAMP", "'16/11/2023 18:15' is no time", "2023-11-16 18:15:46.6805900"),
        ("1700158546.68,3,4", "TIMESTAMP", "'1700158546.68' is no time", "2023-11-16 18:15:46.6805900"),
        ("2023-11-16,3,4", "TIMESTAMP", "'2023-11-16' is no time", TAKE_OUT),
        ("2023-02-30 18:15:47,3,4", "TIMESTAMP", "'2023-02-30 18:15:47' is no time", TAKE_OUT),
        ("2023-11-16 25:15:47,3,4", "TIMESTAMP", "'2023-11-16 25:15:47' is no time", TAKE_OUT),
        ("2023-11-16 18:15:47+99:00,3,4", "TIMESTAMP", "+99:00' is no time", TAKE_OUT),
        (",3,4", "TIMESTAMP", "'' is no time", TAKE_OUT),
        ("2023-11-16 18:15:47,3", "GeneratedTokens", "2 values '2023-11-16 18:15:47,3' for 3", HEADER),
        ("2023-11-16 18:15:47,1,234,4", None, "4 values", "numbers without separators"),
    ],
)
def test_a_broken_row_is_named_with_its_remedy(write, line, column, found, remedy):
    path = write([*OF_2023[:3], "", line, *OF_2023[3:]])
    with pytest.raises(TraceError) as caught:
        read_azure(path)
    error = caught.value
    assert (error.path, error.line, error.column) == (path, 5, column)
    message = str(error)
    assert message.startswith(f"{path}, line 5" + (f", column {column}: " if column else ": "))
    assert found in message and remedy in message and len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("content", "line", "column", "found", "remedy"),
    [
        (b"", 1, None, "an empty file", FETCH),
        (b"\xef\xbb\xbf\r\n \r\n", 1, None, "an empty file", FETCH),
        (f"{HEADER}\n\n".encode(), 1, None, "a header without rows", FETCH),
        ("\n".join(OF_2023[1:]).encode(), 1, "TIMESTAMP", "no such column", f"names each of {HEADER} once"),
        (b"TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens", "no such column", f"names each of {HEADER}"),
        (f"{HEADER.lower()}\n".encode(), 1, "TIMESTAMP", "'timestamp,contexttokens", "names each of"),
        (f"{HEADER},ContextTokens\n".encode(), 1, "ContextTokens", "more than one such column", "once"),
        ("\n".join(OF_2023).encode("utf-16"), 1, "TIMESTAMP", "no such column", "UTF-8"),
        (HEADER.encode() + b"\n2023-11-16 18:15:47,\xff3,4", 2, "ContextTokens", r"'\udcff3'", TAKE_OUT),
        (f'{HEADER}\n2023-11-16 18:15:47,3,"4\n{OF_2023[1]}'.encode(), 2, "GeneratedTokens", "'4", TAKE_OUT),
        (f'{HEADER}\n{OF_2023[1]}\n"{"x" * 140_000}'.encode(), 3, None, "not CSV (field larger", FETCH),
        (
            f'{HEADER},note\n{OF_2023[1]},"of two\nlines"\nbroken'.encode(),
            4,
            "ContextTokens",
            "1 values",
            HEADER,
        ),
    ],
)
def test_a_broken_file_is_named_with_its_remedy(write, content, line, column, found, remedy):
    path = write(content)
    with pytest.raises(TraceError) as caught:
        read_azure(path)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"{path}, line {line}")
    assert found in str(caught.value) and remedy in str(caught.value)


def test_a_missing_file_and_wrong_options_are_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_azure(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="limit 0: read at least 1 row"):
        read_azure(write(OF_2023), limit=0)
    for window_s in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"window_s {window_s}: choose seconds above 0"):
            read_azure(write(OF_2023), window_s=window_s)
