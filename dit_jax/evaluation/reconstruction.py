"""How well a trained autoencoder reconstructs held-out images: PSNR, SSIM, LPIPS, and the use of its codebook."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import LPIPS_MIN_SIZE
from dit_jax.metrics.held_out import masked_sums, means
from dit_jax.metrics.picture import to_uint8
from dit_jax.metrics.reconstruction import SSIM_WINDOW, psnr, ssim
from dit_jax.models.autoencoder import Autoencoder
from dit_jax.models.quantizer import code_counts
from dit_jax.parallel.mesh import to_host
from dit_jax.parallel.preemption import heed
from dit_jax.perceptual.lpips import lpips
from dit_jax.types import Array, Batch, Params

METRICS = ("psnr", "ssim", "lpips", "codes", "rfd")  # codes: of a VQ autoencoder alone


def available_metrics(num_codes: int | None, image_size: int, has_lpips: bool) -> dict[str, str | None]:
    """Returns every metric with what keeps it from being measured, None where nothing does."""
    too_small = f"images have fewer than {LPIPS_MIN_SIZE} pixels a side" if image_size < LPIPS_MIN_SIZE else None
    return {
        "psnr": None,
        "ssim": None if image_size >= SSIM_WINDOW else f"images have fewer than {SSIM_WINDOW} pixels a side",
        "lpips": too_small
        or (None if has_lpips else "its weights are missing; ./launch/lpips_weights.sh fetches them"),
        "codes": None if num_codes else "the autoencoder is not quantized",
        "rfd": None,
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
    found = []
    for batch in batches:
        found.append(measure(params, lpips_params, batch))
        heed()
    values, count = means(jax.tree.map(to_host, found))
    return values | {"num_images": count}


def reconstructed(module: Autoencoder, params: Params, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Yields the reconstructions of all real images of `batches`, uint8 [n, H, W, 3], on every process.

    batches: on the mesh; a grey image's channel is repeated.
    """

    @jax.jit
    def reconstruct(params: Params, images: Array) -> Array:
        images = to_uint8(module.apply({"params": params}, images, None).images)
        return jnp.broadcast_to(images, (*images.shape[:3], 3))

    for batch in batches:
        images = to_host(reconstruct(params, batch["image"]))
        yield images[to_host(batch["mask"]) > 0]
        heed()


def _make_measure(
    module: Autoencoder, metrics: list[str]
) -> Callable[[Params, Params | None, Batch], dict[str, Array]]:
    def measure(params: Params, lpips_params: Params | None, batch: Batch) -> dict[str, Array]:
        images = batch["image"]
        output = module.apply({"params": params}, images, None)
        reconstructions = jnp.clip(output.images, -1.0, 1.0)
        values = {"psnr": psnr, "ssim": ssim, "lpips": lambda *pair: lpips(lpips_params, *pair)}
        with jax.default_matmul_precision("float32"):  # figures to compare with others'
            terms = {name: measured(images, reconstructions) for name, measured in values.items() if name in metrics}
        if "codes" in metrics:
            terms["codes"] = jax.vmap(lambda indices: code_counts(indices, module.num_codes))(output.indices)
        return masked_sums(terms, batch["mask"])

    return measure
