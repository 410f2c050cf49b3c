"""Times the Frechet distance, precision and recall of N features of D dimensions, and their memory beside the features.

    python tests/speed/sample_metrics.py [N] [D]      (default: 50000 2048; the DiT paper's, and its features')

The features are not those of a network, but like them: not negative, correlated, of falling variances. Precision and
recall are against as many references.
"""

import resource
import sys
import time

import numpy as np

from dit_jax.metrics.frechet import frechet_distance, statistics
from dit_jax.metrics.precision_recall import device_bytes, precision_recall


def features(num_images, dimension, seed):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((64, dimension), np.float32) / 8
    rows = [rng.standard_normal((min(1000, num_images - i), 64), np.float32) for i in range(0, num_images, 1000)]
    noise = lambda x: rng.standard_normal((len(x), dimension), np.float32)  # noqa: E731
    return np.concatenate([np.maximum(x @ mixing + 0.3 * noise(x) + 0.1 * seed, 0) for x in rows])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def main(num_images=50_000, dimension=2048):
    samples, references = (features(num_images, dimension, seed) for seed in (0, 1))
    print(
        f"{num_images:,} features of {dimension:,} and as many references: {2 * samples.nbytes / 2**30:.2f} GiB",
        flush=True,
    )
    start = time.perf_counter()
    pair = [statistics(x) for x in (samples, references)]
    print(f"both statistics {time.perf_counter() - start:.1f} s, peak {peak():.2f} GiB", flush=True)
    start = time.perf_counter()
    distance = frechet_distance(*pair)
    print(
        f"distance {distance.value:.6f}, {time.perf_counter() - start:.1f} s, residual {distance.residual:.1e}",
        flush=True,
    )
    start = time.perf_counter()
    print(
        precision_recall(samples, references), f"{time.perf_counter() - start:.1f} s, peak {peak():.2f} GiB", flush=True
    )
    print(f"stated bound on a device: {device_bytes(dimension) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
