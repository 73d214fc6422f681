"""What benchmarks write above their tables."""

from benchmarks.common import cpu_name

TWO_CORES = """processor\t: 0
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC

processor\t: 1
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
"""


def test_a_processor_whose_name_is_hidden_is_told_by_its_family_and_model():
    assert cpu_name(TWO_CORES) == "AMD EPYC (family 26, model 2)"
    assert cpu_name("model name\t: Neoverse-N1\n") == "Neoverse-N1"
