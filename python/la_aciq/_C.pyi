from typing import TypedDict

class BuildInfo(TypedDict):
    torch: str
    compiler: str
    cuda: bool

class CpuInfo(TypedDict):
    isa: str
    available: list[str]
    threads: int

def build_info() -> BuildInfo: ...
def cpu_info() -> CpuInfo: ...
def force_isa(isa: str) -> None: ...
