"""The table of README.md is what the records say."""

from mla_kernels.measure.provenance import DATA, ROOT
from mla_kernels.study.findings import BEGIN, markdown, replace_between_markers
from mla_kernels.study.loading import load_all


def test_readme_table_is_that_of_the_records():
    text = (ROOT / "README.md").read_text()
    assert text.count(BEGIN) == 1
    current = replace_between_markers(text, markdown(load_all(data=DATA)))
    assert text == current, "bring it up to date: python -m mla_kernels.study findings --update README.md"
