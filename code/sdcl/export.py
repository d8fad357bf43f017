"""Networks as one graph for other programs: ONNX or TorchScript, from a normalised window to probabilities."""

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdcl.runs.atomic import replacing
from sdcl.runs.errors import UserError

Format = Literal["onnx", "torchscript"]
METADATA = "sdcl.json"  # the name of the metadata within a TorchScript file
KEY = "sdcl"  # and among an ONNX file's properties
OPSET = 18


class MeanProbabilities(nn.Module):
    """The mean of several networks' probabilities.

    Args:
        networks: of one input and one number of classes; put into eval mode.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised windows (N, channels, *S) to probabilities (N, C, *S) in float32."""
        total = torch.softmax(self.networks[0](image), 1)
        for network in list(self.networks)[1:]:
            total = total + torch.softmax(network(image), 1)
        return total / len(self.networks)


def export(
    networks: Sequence[nn.Module], path: Path, form: Format, shape: Sequence[int], metadata: dict[str, Any]
) -> None:
    """Write networks as one graph, "image" (N, channels, *S) to "probabilities" (N, C, *S), N as the caller likes.

    Args:
        networks: whose probabilities are averaged; on the CPU.
        path: the file.
        form: of it.
        shape: (channels, *S) of the input.
        metadata: what stands in the file beside the graph, as JSON: under "sdcl" in ONNX's properties, as TorchScript's
            extra file "sdcl.json".

    Raises:
        UserError: a package is missing that the format needs.
    """
    model, example = copy.deepcopy(MeanProbabilities(networks)).requires_grad_(False), torch.zeros(2, *shape)
    text = json.dumps(metadata, indent=1, default=str)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        if form == "torchscript":
            traced = torch.jit.trace(model, example, check_trace=False)
            with replacing(path) as temporary:
                torch.jit.save(traced, str(temporary), _extra_files={METADATA: text})
            return
        try:
            import onnx
            import onnxscript  # noqa: F401 - the exporter needs it
        except ImportError as error:
            raise UserError(
                f"--format onnx needs the package {error.name}: `pip install onnx onnxscript`, or choose torchscript."
            ) from None
        batch = torch.export.Dim("batch", min=1)
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, input_names=["image"], output_names=["probabilities"],
            dynamic_shapes={"image": {0: batch}}, opset_version=OPSET,
        )  # fmt: skip
        content = program.model_proto
        entry = content.metadata_props.add()
        entry.key, entry.value = KEY, text
        with replacing(path) as temporary:
            onnx.save(content, str(temporary))
