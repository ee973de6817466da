"""SAELens itself as the judge: SAEs that it wrote, read by polyhelm; and SAEs that polyhelm wrote, read by it.

    pip install sae-lens
    python -m benchmarks.saelens_check

`sae-lens` brings transformer-lens, datasets and a good deal more, so it is no dependency of the tests; those use the
formulas that its documentation gives. Writes down the largest differences, and fails where one is above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch

from benchmarks.environment import environment
from server.version import code_version
from steering_store.formats import ImportOptions, export_saelens, import_artifact
from steering_store.formats.reconstruction import features
from steering_store.formats.sae import Sae
from steering_store.manifest import ModelSpec, parse_manifest

WIDTH, FEATURES, TOKENS, TOLERANCE = 64, 512, 1000, 1e-4
HEADS = 4
MODEL = ModelSpec(architecture="LlamaForCausalLM", hidden_size=WIDTH, num_layers=12, widths={"head_out": WIDTH})
OPTIONS = ImportOptions(model=MODEL)
RESULTS = Path(__file__).parent / "results" / "saelens.json"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 20},
    "topk, rescaled by the decoder's norms": {"k": 20, "rescale_acts_by_decoder_norm": True},
    "standard, b_dec not subtracted": {"apply_b_dec_to_input": False},
    "jumprelu of the heads": {"hook": "blocks.3.attn.hook_z", "reshape_activations": "hook_z"},
}


def written_by_saelens(name: str, folder: Path) -> sae_lens.SAE[Any]:
    """An SAE of random weights, saved by SAELens."""
    fields = dict(ARCHITECTURES[name])
    hook = fields.pop("hook", "blocks.3.hook_resid_post")
    config = {
        "architecture": name.split(",")[0].split(" ")[0],
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "dtype": "float32",
        "device": "cpu",
        "metadata": {"sae_lens_version": version("sae-lens"), "model_name": "m", "hook_name": hook},
        **fields,
    }
    sae = sae_lens.SAE.from_dict(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    sae.save_model(folder)
    return sae


def differences(theirs: sae_lens.SAE[Any], ours: Sae) -> dict[str, float]:
    """The largest difference in feature activations and in reconstructions, values at a threshold left out."""
    x = torch.randn(TOKENS, WIDTH)
    heads = theirs.cfg.reshape_activations == "hook_z"
    with torch.no_grad():
        acts = theirs.encode(x.unflatten(-1, (HEADS, -1)) if heads else x)
        out = theirs.decode(acts)
    expected, decoded = acts.numpy(), (out.flatten(-2) if heads else out).numpy()
    found = features(ours, x.numpy())
    flipped = (expected != 0) != (found != 0)
    assert 0 < np.count_nonzero(expected) and flipped.mean() < 1e-4
    rows = ~flipped.any(axis=1)
    return {
        "features": float(np.abs(found - expected)[~flipped].max()),
        "reconstruction": float(np.abs(found @ ours.decoder + ours.decoder_bias - decoded)[rows].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, float]]] = {"read by polyhelm": {}, "written by polyhelm": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(ARCHITECTURES):
            folder = Path(temporary) / str(number)
            theirs = written_by_saelens(name, folder)
            draft = import_artifact(folder, OPTIONS)
            assert draft.sae is not None
            results["read by polyhelm"][name] = differences(theirs, draft.sae)
            if draft.sae.top_k is None:
                export_saelens(parse_manifest(draft.manifest), draft.tensors, folder / "exported")
                loaded = sae_lens.SAE.load_from_disk(folder / "exported")
                results["written by polyhelm"][name] = differences(loaded, draft.sae)
    worst = max(value for group in results.values() for each in group.values() for value in each.values())
    block = environment()
    block["versions"] |= {"sae-lens": version("sae-lens")}
    sizes = {"width": WIDTH, "features": FEATURES, "tokens": TOKENS, "worst": worst, "tolerance": TOLERANCE}
    text = json.dumps({"environment": block, "code_version": code_version(), **sizes, **results}, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)
    if not worst < TOLERANCE:
        raise SystemExit(f"the largest difference is {worst}")


if __name__ == "__main__":
    main()
