"""Kernels compiled for a GPU that is not there, by a program of its own, which is not interpreted.

done = run_program(PROGRAM, 90)            # and in PROGRAM, before it imports kernels:
pretend(90)                                # compute capability 9.0
compiled = recorded((module, "_kernel"))   # launches compile, and run nothing
assembled(compiled[0], 90, path)           # what the assembler says of it: registers, spills, warnings
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path


def run_program(program, *arguments):
    """With the paths of the tests, those of kernels among them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1] / "ops"), *sys.path])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def pretend(capability):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoGPU:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(NoGPU())


def recorded(*kernels):
    """The list that what is compiled goes to, launch by launch; kernels: (module, name)."""
    compiled = []
    for module, name in kernels:
        kernel = getattr(module, name)

        def run(*args, warmup, launch=kernel.run, **options):
            compiled.append(launch(*args, warmup=True, **options))

        kernel.run = run
    return compiled


def overlap_of(capability):
    """What `dependent_launch` says for such a GPU."""
    return {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}


def assembled(compiled, capability, path):
    """By the assembler that this release of Triton has for such a GPU."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()
    Path(path).write_text(compiled.asm["ptx"])
    arch = f"-arch=sm_{capability}" + "a" * (capability == 90)
    command = [tool.path, "-v", arch, path, "-o", f"{path}.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
