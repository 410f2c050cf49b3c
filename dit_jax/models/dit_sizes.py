"""The sizes of DiT (arXiv:2212.09748, table 1), for config files: `config.dit = dit_size("XL/2")`."""

DEPTH_WIDTH_HEADS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dit_size(name: str) -> dict[str, int]:
    """Returns the fields of `DiTConfig` for a name such as "XL/2": a size of table 1 and a patch size."""
    size, _, patch_size = name.partition("/")
    depth, width, num_heads = DEPTH_WIDTH_HEADS[size]
    return {"depth": depth, "width": width, "num_heads": num_heads, "patch_size": int(patch_size)}
