"""How well a trained autoencoder reconstructs held-out images: PSNR, SSIM, LPIPS, and the use of its codebook."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.reconstruction import SSIM_WINDOW, psnr, ssim
from dit_jax.models.autoencoder import Autoencoder
from dit_jax.models.quantizer import code_counts, perplexity
from dit_jax.perceptual.lpips import lpips
from dit_jax.types import Array, Batch, Params

METRICS = ("psnr", "ssim", "lpips", "codes")  # codes: of a VQ autoencoder alone


def available_metrics(num_codes: int | None, image_size: int, has_lpips: bool) -> dict[str, str | None]:
    """Returns every metric with what keeps it from being measured, None where nothing does."""
    return {
        "psnr": None,
        "ssim": None if image_size >= SSIM_WINDOW else f"images have fewer than {SSIM_WINDOW} pixels a side",
        "lpips": None if has_lpips else "its weights are missing; ./launch/lpips_weights.sh fetches them",
        "codes": None if num_codes else "the autoencoder is not quantized",
    }


def measure_reconstructions(
    module: Autoencoder, params: Params, lpips_params: Params | None, batches: Iterable[Batch], metrics: list[str]
) -> dict[str, float]:
    """Returns the means over all real images of `batches` (mask 1), decoded from the posterior's mean, or the codes.

    For "codes": `codes_used`, the share of all codes that occur in any image, and `perplexity` of their frequencies.

    Args:
      lpips_params: of `load_lpips`, where "lpips" is among the metrics; batches: on the mesh.
    """
    measure = jax.jit(_make_measure(module, metrics))
    totals: dict[str, Any] | None = None
    for batch in batches:
        # float64 on the host: the sum of 50,000 images; the last batch's numbers are waited for while this one runs.
        sums = {name: np.asarray(x, np.float64) for name, x in measure(params, lpips_params, batch).items()}
        totals = sums if totals is None else {name: totals[name] + x for name, x in sums.items()}
    count, codes = totals.pop("count"), totals.pop("codes", None)
    values = {name: float(total / count) for name, total in totals.items()} | {"num_images": int(count)}
    if codes is not None:
        values |= {"codes_used": float(np.mean(codes > 0)), "perplexity": float(perplexity(jnp.asarray(codes)))}
    return values


def _make_measure(
    module: Autoencoder, metrics: list[str]
) -> Callable[[Params, Params | None, Batch], dict[str, Array]]:
    def measure(params: Params, lpips_params: Params | None, batch: Batch) -> dict[str, Array]:
        images, mask = batch["image"], batch["mask"]
        output = module.apply({"params": params}, images, None)
        reconstructions = jnp.clip(output.images, -1.0, 1.0)
        values = {"psnr": psnr, "ssim": ssim, "lpips": lambda *pair: lpips(lpips_params, *pair)}
        with jax.default_matmul_precision("float32"):  # figures to compare with others'
            terms = {name: measured(images, reconstructions) for name, measured in values.items() if name in metrics}
        if "codes" in metrics:
            terms["codes"] = jax.vmap(lambda indices: code_counts(indices, module.num_codes))(output.indices)
        real = lambda term: mask.reshape(-1, *[1] * (term.ndim - 1)) > 0  # noqa: E731
        sums = {name: jnp.sum(jnp.where(real(term), term, 0.0), axis=0) for name, term in terms.items()}
        return sums | {"count": mask.sum()}

    return measure
