"""`python -m dit_jax`: the same program as `dit-jax`."""

from dit_jax.cli.main import main

if __name__ == "__main__":
    main()
