"""Proves that the head's kernels become machine code for a Hopper (sm_90), without a GPU, and what that code holds.

Triton's compiler and the assembler in its wheel need no device. Not shown: that the code runs, or how fast.
"""

import json
import os
import subprocess
import sys

COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_sppo.objective import log_ratio_kernels as kernels

TENSORS = {"labels": "*i64", "maxima": "*fp32", "sums": "*fp32", "label_logits": "*fp32", "log_sum_exps": "*fp32",
           "grads": "*fp32", "label_gradients": "*fp32"}
NUMBERS = {"stride": "i32", "num_columns": "i32", "first_column": "i32", "cap": "fp32"}
kind, capped = sys.argv[1], sys.argv[2] == "capped"
shape = kernels._shape(20000)
found = {}
for kernel in (kernels._accumulate, kernels._differentiate):
    constants = {"is_capped": capped, "size": shape["size"]}
    types = {"logits": kind, **TENSORS, **NUMBERS, **dict.fromkeys(constants, "constexpr")}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name in
               ("logits", "stride", "num_columns")}
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constexprs=constants, attrs=aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": shape["num_warps"]})
    found[kernel.__name__] = {"ptx": made.asm["ptx"], "code": len(made.asm["cubin"]), **shape}
print(json.dumps(found))
"""


def compiled(kind, capped=False):
    """Compile both kernels in a process of its own, where Triton compiles instead of interpreting -> by name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, kind, "capped" if capped else ""]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300).stdout)


def test_a_logit_costs_one_exponential_and_moves_sixteen_bytes_at_a_time():
    """4096 columns on 8 warps are 16 logits a thread: 16 exponentials, and 32 bytes in 2 loads (and 2 stores).

    Forward has one exponential more, which rescales the sum.
    """
    kernels = compiled("*bf16")
    for name, exponentials, stores in (("_accumulate", 17, 0), ("_differentiate", 16, 2)):
        kernel = kernels[name]
        assert (kernel["size"], kernel["num_warps"]) == (4096, 8)
        ptx = kernel["ptx"]
        assert ptx.count("ex2.approx") == exponentials
        assert (ptx.count("ld.global.v4"), ptx.count("st.global.v4")) == (2, stores)
        assert ".local" not in ptx, "a thread's logits no longer fit its registers"
        assert ".target sm_90" in ptx and kernel["code"] > 0


def test_softcapped_and_float32_logits_compile_too():
    assert all(kernel["code"] > 0 for kernel in compiled("*fp32", capped=True).values())
