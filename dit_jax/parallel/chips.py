"""What an accelerator chip can do at best, by the name that JAX gives its devices.

Every figure is its vendor's, of one chip: dense bfloat16 matmuls, memory, and all links to other chips together in one
direction (Google Cloud's pages on v4, v5e, v5p, v6e and TPU7x, and table 4 of arXiv:2304.01433 for v3; NVIDIA's data
sheets, without sparsity, the links being NVLink; where those give both directions, half of it).
"""

import dataclasses

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip; see `per_device` for chips that JAX shows as two devices."""

    name: str
    peak_flops: float  # bfloat16 floating-point operations a second, a multiply-add being two
    memory_bytes: int
    memory_bandwidth: float  # bytes a second
    network_bandwidth: float  # bytes a second that a chip can send within a slice
    devices: int = 1  # that JAX shows for a chip

    def per_device(self) -> "Chip":
        """Returns a device's share of a chip."""
        return dataclasses.replace(
            self,
            peak_flops=self.peak_flops / self.devices,
            memory_bytes=self.memory_bytes // self.devices,
            memory_bandwidth=self.memory_bandwidth / self.devices,
            network_bandwidth=self.network_bandwidth / self.devices,
            devices=1,
        )


CHIPS = {  # by `device_kind`
    "TPU v3": Chip("v3", 123e12, 32 * GIB, 900 * GB, 280 * GB, devices=2),
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228 * GB, 300 * GB),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819 * GB, 200 * GB),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765 * GB, 600 * GB),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640 * GB, 400 * GB),
    "TPU7x": Chip("tpu7x", 2307e12, 192 * GIB, 7380 * GB, 600 * GB, devices=2),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB", 312e12, 40 * GB, 1555 * GB, 300 * GB),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 312e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 * GB, 3350 * GB, 450 * GB),
    "NVIDIA H200": Chip("H200", 989e12, 141 * GB, 4800 * GB, 450 * GB),
    "NVIDIA B200": Chip("B200", 2250e12, 192 * GB, 8000 * GB, 900 * GB),
}


def chip_of(device_kind: str) -> Chip:
    """Returns the chip of a device's kind.

    Raises:
      ValueError: for a kind that the table does not have.
    """
    if device_kind not in CHIPS:
        raise ValueError(f"no figures for the device {device_kind!r}, only for {', '.join(CHIPS)}; add it to CHIPS")
    return CHIPS[device_kind]
