"""One weight of the model: one row says everything about it.

    W("llama.layers.attn.q.kernel", "layers embed heads head_dim", "(heads head_dim) embed",
      "model.layers.{l}.self_attn.q_proj.weight", "language_model.model.layers.{l}.self_attn.q_proj.weight")

Its path in this model, the names of its axes, the same axes as PyTorch's files hold them (an einops pattern), and its
names in the original's files and in the documented layout.  A weight whose name counts layers is stacked here along its
first axis: `{l}` is the layer, `{c}` a layer with cross-attention.  `[0]` and `[2]` at the end of a name are the first
and the last third of a fused vector.
"""

from typing import NamedTuple


class W(NamedTuple):
    """A weight.  `torch` leaves out the layer axis."""

    path: str
    axes: str
    torch: str
    name: str
    documented: str

    @property
    def stacked(self) -> bool:
        """Whether the files hold one weight for each layer."""
        return "{" in self.name

    @property
    def layer_axes(self) -> list[str]:
        """The axes of one layer, or of the whole where it is not stacked."""
        return self.axes.split()[self.stacked :]

    @property
    def input_axes(self) -> int:
        """How many of a kernel's `layer_axes` a matmul sums over; the hidden state, "embed", is one side of it."""
        first, *rest = self.layer_axes
        return 1 if first.endswith("embed") else len(rest)


def low_rank(row: W) -> tuple[W, W]:
    """The rows of A and B, a kernel's low-rank update: the axes on either side of the matmul, and the rank.

    PEFT names them after the module and holds A as `[rank, in]`, B as `[out, rank]`.
    """
    cut, module = row.input_axes, f"base_model.model.{row.name.removesuffix('.weight')}"
    inputs, outputs = row.layer_axes[:cut], row.layer_axes[cut:]
    place, layers = row.path.removesuffix("kernel") + "lora", row.axes.split()[0]
    a, b = " ".join([layers, *inputs, "rank"]), " ".join([layers, "rank", *outputs])
    return (
        W(f"{place}.a", a, f"rank ({' '.join(inputs)})", f"{module}.lora_A.weight", ""),
        W(f"{place}.b", b, f"({' '.join(outputs)}) rank", f"{module}.lora_B.weight", ""),
    )


def in_blocks(row: W) -> tuple[str | None, ...]:
    """A kernel's axes where quantisation has cut its last input axis into blocks: None for the inputs of a block."""
    names = row.axes.split()
    at = 1 + row.input_axes
    return (*names[:at], None, *names[at:])


def linear(path: str, layers: str, inputs: str, outputs: str, name: str, documented: str = "") -> tuple[W, W]:
    """Kernel and bias of a linear layer, stacked along `layers` or alone; files merge the axes of a side into one."""
    left, right = (f"({axes})" if " " in axes else axes for axes in (outputs, inputs))
    kernel, documented = f"{layers} {inputs} {outputs}".strip(), documented or name
    return (
        W(f"{path}.kernel", kernel, f"{left} {right}", f"{name}.weight", f"{documented}.weight"),
        W(f"{path}.bias", f"{layers} {outputs}".strip(), left, f"{name}.bias", f"{documented}.bias"),
    )  # fmt: skip


def norm(path: str, layers: str, width: str, name: str, documented: str = "") -> tuple[W, W]:
    """Scale and bias of a layer norm."""
    axes, documented = f"{layers} {width}".strip(), documented or name
    return (
        W(f"{path}.scale", axes, width, f"{name}.weight", f"{documented}.weight"),
        W(f"{path}.bias", axes, width, f"{name}.bias", f"{documented}.bias"),
    )
