"""The machine without its GPU: processor, memory, how hostile documents are confined, fonts."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from ropewalk.doctor.findings import Finding, Looking
from ropewalk.sandbox import containment

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts")
CJK = ("cjk", "wqy", "wenquan", "ipagothic", "ipaexg", "takao", "droidsansfallback", "sourcehan", "unifont")
FEW_FILES = 4096


def machine() -> list[Finding]:
    """What the machine gives."""
    look = Looking("machine")
    _memory(look)
    with look.at("sandbox"):
        _sandbox(look)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < FEW_FILES and most < FEW_FILES
    way = f"ulimit -n {FEW_FILES}, or LimitNOFILE= of the service" if few else None
    look.say("open files", "note" if few else "ok", f"at most {files} at once", way)
    _fonts(look)
    return look.found


def _memory(look: Looking) -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{pages / 1e9:.1f} GB"
    if (info := Path("/proc/meminfo")).exists():
        available = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable:"))
        text += f", {int(available.split()[1]) * 1024 / 1e9:.1f} GB available"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (most := limit.read_text().strip()).isdecimal() and int(most) < pages:
        text += f"; this group of processes may use {int(most) / 1e9:.1f} GB"
    look.say("memory", "ok", text)
    look.say("processor", "ok", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores")


def _sandbox(look: Looking) -> None:
    held = containment()
    lacking = [name for name, there in held.items() if not there]
    if lacking:
        text = f"limits and {', '.join(name for name, there in held.items() if there)}; not here: {', '.join(lacking)}"
        look.say("sandbox", "note", text, "a kernel from 5.13 on has Landlock; a container must allow user namespaces")
    else:
        look.say("sandbox", "ok", f"limits, {', '.join(held)}")


def _fonts(look: Looking) -> None:
    names = [
        path.name.lower().replace("-", "").replace("_", "")
        for folder in FONT_FOLDERS
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in (".ttf", ".ttc", ".otf", ".pfb")
    ]
    if any(part in name for name in names for part in CJK):
        look.say("fonts", "ok", f"{len(names)}, among them Chinese, Japanese and Korean")
    else:
        text = f"{len(names)}, none with Chinese, Japanese or Korean: pages that do not embed theirs are drawn without"
        look.say("fonts", "note", text, "Debian: apt install fonts-noto-cjk")
