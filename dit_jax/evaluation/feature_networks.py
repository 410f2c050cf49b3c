"""Networks whose features are compared: their files, from those that others publish (what `dit-jax convert` does)."""

import pathlib

from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.metrics.inception import abstract_inception, inception_network
from dit_jax.pretrained.files import read_tensors, write_tensors
from dit_jax.pretrained.inception import graph_entries, port_entries, read_graph, without_counters
from dit_jax.pretrained.name_map import Entry, flatten, from_tensors


def import_network(kind: str, source: pathlib.Path, output: pathlib.Path) -> None:
    """Writes what `load_network` reads, a .safetensors file.

    Args:
      kind: inception.
      source: of inception, the PyTorch port (pt_inception-2015-12-05-6726825d.pth) or TensorFlow's graph
        (classify_image_graph_def.pb).

    Raises:
      ValueError: where the weights do not fit, naming the tensor; nothing is written then.
    """
    abstract = abstract_inception()
    if source.suffix == ".pb":
        entries = list(graph_entries(abstract))
        tensors = read_graph(source, {name for entry in entries for name in entry.names})
    else:
        entries, tensors = list(port_entries(abstract)), without_counters(read_tensors(source))
    try:
        params = from_tensors(entries, tensors, abstract)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    write_tensors(output, dict(flatten(params)))


def load_network(path: str | pathlib.Path) -> FeatureNetwork:
    """Returns the network in a file that `dit-jax convert` wrote, told by its tensors' names.

    Raises:
      ValueError: where there is no such file, or it holds something else.
    """
    tensors = read_tensors(path)
    abstract = abstract_inception()
    try:
        params = from_tensors([Entry(name, (name,)) for name, _ in flatten(abstract)], tensors, abstract)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; is it of dit-jax convert --kind=inception?") from error
    return inception_network(params)
