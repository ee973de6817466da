"""sparsify (github.com/EleutherAI/sparsify): a folder, named after the module, of `cfg.json` and `sae.safetensors`.

encoder.weight [features, width], encoder.bias, W_dec [features, width], b_dec:

    f = relu(p) among the k largest p = encoder (x - b_dec) + encoder.bias;  x^ = f W_dec + b_dec

The module, as `layers.12` or `h.5.mlp`, is the folder's name and no field; its output is what the SAE sees.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from steering_store.errors import InvalidManifest, UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, agreed_site, sae_draft
from steering_store.formats.files import Config, Folder, Name, read_floats
from steering_store.formats.hooks import site_of_hook
from steering_store.formats.sae import Sae, folded

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


class _Fields(Config):
    d_in: PositiveInt
    k: PositiveInt
    activation: Name = "topk"
    num_latents: NonNegativeInt = 0
    expansion_factor: NonNegativeInt = 0
    signed: bool = False
    skip_connection: bool = False
    transcode: bool = False


def import_sparsify(path: Path, options: ImportOptions) -> Draft:
    """An SAE from its folder, with `top_k`: to be calibrated before it is published. Raises a StoreError."""
    folder = Folder(path if path.is_dir() else path.parent)
    fields = folder.config(CONFIG, _Fields)
    if fields.activation != "topk" or fields.signed:
        raise UnsupportedFile(f"{CONFIG}: activation {fields.activation!r}, or signed; only topk is known", CONFIG)
    if fields.transcode or fields.skip_connection:
        raise UnsupportedFile(f"{CONFIG}: a transcoder, and no autoencoder of one site", CONFIG)
    hook = folder.path.absolute().name
    if options.point is None or options.layer is None:
        point, layer = agreed_site(*site_of_hook(hook, options.model.architecture, hook), options, hook)
    else:
        point, layer = options.point, options.layer
    with folder.open(WEIGHTS) as stream:
        encoder, bias, decoder, decoder_bias = read_floats(stream, WEIGHTS, _TENSORS, options.max_bytes).values()
    sae = Sae(encoder, bias, decoder, decoder_bias, None, None, fields.k)
    sae.check_shapes(WEIGHTS)
    latents = fields.num_latents or fields.d_in * fields.expansion_factor
    if encoder.shape != (latents or len(encoder), fields.d_in):
        raise InvalidManifest(f"{CONFIG}: d_in and the number of latents differ from encoder.weight", CONFIG)
    source = {"format": "sparsify", "hookpoint": hook}
    return sae_draft(folded(sae, bias_is_subtracted=True), point, layer, options, source, WEIGHTS)
