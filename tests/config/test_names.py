"""Recipes by name: what `--cfg`, `load_config` and `_BASE_` find, and what they say where there is nothing."""

import re
from pathlib import Path

import pytest

from maskfeat.config import load_config, save_config
from maskfeat.config.recipes import CONFIG_ROOT, INSTALLED, find_recipe, recipe_names, shipped_file
from tests.small import REPO

NAME = "masked_ssl/in1k_VIT_B_MaskFeat_PT"
FILE = CONFIG_ROOT / f"{NAME}.yaml"


def test_a_checkout_uses_its_own_recipes() -> None:
    assert REPO / "configs" == CONFIG_ROOT and not INSTALLED


def test_names_are_those_of_the_recipes() -> None:
    assert NAME in recipe_names() and "quickstart/images_pt" in recipe_names()
    assert len(recipe_names()) == len(list(CONFIG_ROOT.rglob("*.yaml"))) - len(list(CONFIG_ROOT.rglob("_base_/*.yaml")))
    assert all(find_recipe(name) == CONFIG_ROOT / f"{name}.yaml" for name in recipe_names())


@pytest.mark.parametrize("form", ["{}", "{}.yaml", "configs/{}", "configs/{}.yaml", "./configs/{}.yaml", "./{}"])
def test_forms_of_a_name(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(form.format(NAME)) == FILE
    assert find_recipe(Path(form.format(NAME))) == FILE
    assert load_config(form.format(NAME)) == load_config(FILE)


def test_a_file_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / f"{NAME}.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"_BASE_: {FILE}\nTASK: own\n")
    assert load_config(f"configs/{NAME}.yaml").TASK == "own"
    assert load_config(f"{NAME}.yaml").TASK == "ssl"
    (tmp_path / "quickstart" / "images_pt").mkdir(parents=True)  # a folder of this name is no config
    assert load_config("quickstart/images_pt").TASK == "pt"


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("TASK: own\n")
    assert load_config("~/own.yaml").TASK == "own"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("masked_ssl/in1k_VIT_B_MaskFeat_P", NAME),
        ("in1k_vit_b_maskfeat_pt", NAME),
        ("configs/quickstart/image_pt.yaml", "quickstart/images_pt"),
        ("images_pt.yaml", "quickstart/images_pt"),
    ],
)
def test_an_unknown_name_lists_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"config file {re.escape(given)} does not exist.*nearest names are") as error:
        find_recipe(given)
    names = str(error.value).rpartition(" are ")[2].split(", ")
    assert len(names) == 3 and names[0] == nearest


@pytest.mark.parametrize("given", ["", ".", "..", "masked_ssl", "a" * 5000, "a\0b", "/etc/hostname/x"])
def test_what_names_nothing(given: str) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_recipe(given)


def test_no_name_leads_out_of_the_recipes() -> None:
    assert (CONFIG_ROOT / "../pyproject.toml").is_file()
    for name in ("../pyproject.toml", "masked_ssl/../../pyproject.toml", str(REPO / "pyproject.toml")):
        assert shipped_file(name) is None


def test_a_base_by_name(tmp_path: Path) -> None:
    """An own config builds on a recipe wherever it lies; a file beside it comes first."""
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {NAME}.yaml\n")
    assert load_config(own) == load_config(FILE)
    own.write_text(f"_BASE_: {NAME}\n")
    assert load_config(own) == load_config(FILE)
    (tmp_path / "masked_ssl").mkdir()
    (tmp_path / f"{NAME}.yaml").write_text("TASK: beside\n")
    own.write_text(f"_BASE_: {NAME}.yaml\n")
    assert load_config(own).TASK == "beside"
    own.write_text("_BASE_: ../pyproject.toml\n")
    with pytest.raises(ValueError, match="lies outside"):
        load_config(own)


def test_a_recipe_by_name_is_saved_as_given(tmp_path: Path) -> None:
    save_config(NAME, [], load_config(NAME), tmp_path)
    assert (tmp_path / "config_given.yaml").read_text() == FILE.read_text()
