"""What the repository tells its users stays true."""

import re
from pathlib import Path

import pytest
import yaml

from calibquant.solver.config import KEYS, load_config, plain, reference
from tests.test_quickstart import flat

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("exp/**/*.yaml"))


def test_the_readme_holds_the_whole_configuration_reference():
    assert reference() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "exp")))
def test_every_config_is_valid_complete_and_names_its_own_command(path):
    config = load_config(path)
    lines = path.read_text().splitlines()
    assert {key.path for key in KEYS} <= {*flat(yaml.safe_load(path.read_text()))}
    assert f"./{path.relative_to(ROOT)}" in "\n".join(lines[:3])
    assert not re.search(r":\s*/", path.read_text()), "a machine's path"
    bits = re.search(r"w(\d)a(\d)", str(path))
    assert bits is not None
    quant = plain(config)["quant"]
    assert [str(quant["w_qconfig"]["bit"]), str(quant["a_qconfig"]["bit"])] == list(bits.groups())


def test_both_bit_widths_have_the_five_networks():
    for bits in ("w4a4", "w2a4"):
        for short in ("rs18", "rs34", "rs50", "rs101", "rs152"):
            config = load_config(ROOT / "exp" / bits / short / "config.yaml")
            assert config.model.type == short.replace("rs", "resnet")
            assert config.quant.recon.iters == 20000 and config.quant.calibrate == 1024
