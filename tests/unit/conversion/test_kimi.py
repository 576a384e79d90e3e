"""Kimi-K2 is DeepSeek-V3 under another name: converted and held against transformers, its files' code never run.

transformers has no model of that name and would ask for leave to run the code; vLLM takes DeepSeek-V3's, too.
"""

import json
from pathlib import Path

from megatron_sppo.conversion.convert import export_checkpoint, import_checkpoint
from megatron_sppo.verification.verify import verify
from tests.families import family_model

CODE = "raise SystemExit('code of the model directory has run')"


def test_kimi_k2_is_computed_as_deepseek_v3_and_its_code_is_not_run(tmp_path: Path) -> None:
    hf = family_model(tmp_path / "hf", "deepseek_v3")
    config = json.loads((hf / "config.json").read_text())
    config |= {
        "model_type": "kimi_k2",
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
    }
    (hf / "config.json").write_text(json.dumps(config))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (hf / name).write_text(CODE)
    import_checkpoint(hf, tmp_path / "megatron")
    report = verify(hf, tmp_path / "megatron")
    assert report["faults"] == []
    assert report["logits"]["max_abs"] < 1e-5
    out = export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not list(out.glob("*.py"))
    assert all(path.read_bytes() == (hf / path.name).read_bytes() for path in out.iterdir())
