"""Which device torch would compute on, and by which kernels."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ropewalk.doctor.findings import Finding, Looking, State
from ropewalk.kernels.triton_kernels import CAPABILITY, SWITCH, usable
from ropewalk.models.load import pick_device


def device(gpu_needed: bool) -> list[Finding]:
    """The GPU with its kernels, else the processor and what it multiplies quickly."""
    look = Looking("device")
    chosen = pick_device("auto")
    if chosen.type == "cuda":
        with look.at("gpu"):
            _gpu(look, chosen)
    else:
        state: State = "broken" if gpu_needed else "note"
        seen = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
        built = torch.version.cuda or torch.version.hip
        if seen and not built:
            way = "install a build of torch for it: https://pytorch.org/get-started"
            look.say("gpu", state, f"there is one, and torch {torch.__version__} is built without", way)
        elif seen:
            look.say(
                "gpu", "broken", f"there is one, and torch (built for {built}) cannot use it", "check its driver: nvidia-smi"
            )
        else:
            look.say("gpu", state, "none found: everything runs on the processor")
    _processor(look)
    return look.found


def _gpu(look: Looking, chosen: torch.device) -> None:
    properties, (free, whole) = torch.cuda.get_device_properties(chosen), torch.cuda.mem_get_info(chosen)
    major, minor = torch.cuda.get_device_capability(chosen)
    text = f"{properties.name}, compute capability {major}.{minor}, {free / 1e9:.1f} of {whole / 1e9:.1f} GB free"
    look.say("gpu", "ok", f"{text}; {torch.cuda.device_count()} in all; torch for {torch.version.cuda or torch.version.hip}")
    if usable(chosen):
        look.say("triton", "ok", "expert layers run in Triton's kernels")
    else:
        least = ".".join(map(str, CAPABILITY))
        why = f"{SWITCH}=0" if os.environ.get(SWITCH) == "0" else f"it needs the package triton and capability {least}"
        look.say("triton", "note", f"not used ({why}): expert layers run in grouped products")
    if importlib.util.find_spec("flash_attn") is not None:
        look.say("attention", "ok", "flash attention, where the model's heads fit")
    else:
        look.say("attention", "ok", "torch's scaled_dot_product_attention; flash-attn is not installed")


def _processor(look: Looking) -> None:
    known = {"AMX": "amx_tile", "AVX-512 bf16": "avx512_bf16", "AVX-512": "avx512", "AVX2": "avx2"}
    kinds = {name: getattr(torch.cpu, f"_is_{call}_supported", None) for name, call in known.items()}
    has = [name for name, call in kinds.items() if call is not None and call()]
    if "AMX" in has or "AVX-512 bf16" in has:
        text = "bfloat16 is computed quickly"
    else:
        text = "bfloat16 is slow: models are served in float32 on this processor"
    look.say(
        "cpu", "ok", f"{', '.join(has) or torch.backends.cpu.get_cpu_capability()}; {text}; {torch.get_num_threads()} threads"
    )
