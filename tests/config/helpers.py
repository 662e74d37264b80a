"""Small tools of the config tests."""

from pathlib import Path

from yacs.config import CfgNode

from maskfeat.config import load_config

MASKED_SSL = Path(__file__).resolve().parents[2] / "configs" / "masked_ssl"
VIT_PT = MASKED_SSL / "in1k_VIT_B_MaskFeat_PT.yaml"
VIT_FT = MASKED_SSL / "in1k_VIT_B_MaskFeat_FT.yaml"
MVIT_PT = MASKED_SSL / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml"
MFM_PT = MASKED_SSL.parent / "mfm" / "in1k_R50_MFM_PT.yaml"
MFM_VIT_PT = MASKED_SSL.parent / "mfm" / "in1k_VIT_B_MFM_PT.yaml"
R50_FT = MASKED_SSL.parent / "mfm" / "in1k_R50_MFM_FT.yaml"
MVIT_FT = MASKED_SSL / "k400_MVITv2_S_16x4_FT.yaml"


def load_text(folder: Path, text: str, *opts: object) -> CfgNode:
    """`load_config` of a YAML with this text."""
    path = folder / "given.yaml"
    path.write_text(text)
    return load_config(path, opts)


def value_of(cfg: CfgNode, key: str) -> object:
    """The value of a full key."""
    node = cfg
    for part in key.split("."):
        node = node[part]
    return node
