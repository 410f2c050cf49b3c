"""`dit-jax info` of an autoencoder: its codebook's parameters, and its discriminator's aside."""

import json

import pytest

from dit_jax.cli.main import main

CONFIG = "--config=configs/autoencoder_kl.py:f4"


@pytest.mark.parametrize(("num_layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
def test_a_discriminator_is_counted_beside_the_autoencoder(num_layers, parameters, capsys):
    flags = ("info", CONFIG, f"--config.autoencoder.discriminator.num_layers={num_layers}")
    main([*flags, "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["discriminator_parameters"] == parameters
    assert info["parameters"] == sum(info["modules"].values()) == 55_312_063
    main(flags)
    assert f"and in training a discriminator of {parameters:,} parameters\n" in capsys.readouterr().out


def test_the_codes_of_a_vq_autoencoder_are_counted_and_no_discriminator_where_there_is_none(capsys):
    without = ["--config.autoencoder.discriminator=None"]
    main(["info", CONFIG, *without, "--config.autoencoder.codebook.num_codes=8192", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert info["modules"]["quantize"] == 8192 * 3 and info["parameters"] == 55_322_782
    assert "discriminator_parameters" not in info
