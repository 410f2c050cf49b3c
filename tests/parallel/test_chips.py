"""The table of chips: the vendors' figures, and the share of a device where a chip is two."""

import pytest

from dit_jax.parallel.chips import CHIPS, GIB, chip_of


@pytest.mark.parametrize(
    ("device_kind", "teraflops", "gigabytes", "bandwidth"),
    [
        ("TPU v4", 275, 32, 1228e9),
        ("TPU v5 lite", 197, 16, 819e9),
        ("TPU v5", 459, 95, 2765e9),
        ("TPU v6 lite", 918, 32, 1640e9),
        ("TPU7x", 2307, 192, 7380e9),
        ("TPU v3", 123, 32, 900e9),
    ],
)
def test_a_chip_is_found_by_the_name_that_jax_gives_its_devices(device_kind, teraflops, gigabytes, bandwidth):
    chip = chip_of(device_kind)
    assert chip.peak_flops == teraflops * 1e12
    assert chip.memory_bytes == gigabytes * GIB
    assert chip.memory_bandwidth == bandwidth


@pytest.mark.parametrize(
    ("device_kind", "teraflops", "gigabytes"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA B200", 2250, 192),
    ],
)
def test_a_gpu_has_its_data_sheets_dense_peak(device_kind, teraflops, gigabytes):
    chip = chip_of(device_kind)
    assert chip.per_device() == chip  # a GPU is one device
    assert chip.peak_flops == teraflops * 1e12
    assert chip.memory_bytes == gigabytes * 1e9


def test_two_devices_of_a_chip_have_half_of_it_each():
    chip, device = chip_of("TPU7x"), chip_of("TPU7x").per_device()
    for field in ("peak_flops", "memory_bytes", "memory_bandwidth", "network_bandwidth"):
        assert 2 * getattr(device, field) == getattr(chip, field)
    assert chip_of("TPU v4").per_device() == chip_of("TPU v4")


def test_an_unknown_device_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'TPU v99', only for TPU v3, TPU v4, TPU v5 lite"):
        chip_of("TPU v99")
    assert len({chip.name for chip in CHIPS.values()}) == len(CHIPS)
