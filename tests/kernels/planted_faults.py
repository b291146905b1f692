"""Faults for the kernels that run on a GPU alone, each with the GPU tests that must fail by it.

A fault replaces a text that its file has once. `make test-gpu-faults` (fault_runs.py) plants one at a time in a copy of the
repository; test_planted_faults.py holds the list to the files as they are. Left out are changes of precision, such as a state
kept in bf16 between chunks: the tests' bounds allow for bf16.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Selection(NamedTuple):
    """Tests that are run for a fault, and without it as its control."""

    file: str
    expression: str  # pytest's -k

    @property
    def command(self) -> list[str]:
        """Arguments of pytest that select them."""
        return ["-m", "gpu and not slow", self.file, "-k", self.expression]


class Fault(NamedTuple):
    """One change of a file of `megatron_hylo/kernels`."""

    file: str
    old: str
    new: str
    tests: Selection
    error: str | None = None  # what the tests may end with, in place of a failed assertion

    def plant(self, root: Path) -> None:
        """Change the file under `root`, a copy of the repository.

        Raises:
            ValueError: The file does not have the text exactly once, or is not Python any more.
        """
        file = root / self.file
        text = file.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {count} times, not once: write the fault for the code as it is now")
        faulty = text.replace(self.old, self.new)
        try:
            compile(faulty, self.file, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.file} is not Python with {self.new!r} in place of {self.old!r}: {error}") from error
        file.write_text(faulty)


def _kernel(name: str) -> str:
    return f"megatron_hylo/kernels/{name}.py"


def _tests(name: str, expression: str) -> Selection:
    return Selection(f"tests/kernels/test_{name}.py", expression)


GLUON, HEAD, DECODE = _kernel("gluon_delta_rule_state_pass"), _kernel("triton_head_softmax"), _kernel("triton_decode_attention")
CONVOLUTION, SSD, NORM = _kernel("causal_conv1d"), _kernel("ssd"), _kernel("triton_rms_norm")
CONVOLUTION_STEP = _kernel("triton_causal_conv1d_step")

DECODING = _tests("decode_attention", "test_kernels_equal_the_plain_form_on_the_gpu")
FAR_ROWS = _tests("decode_attention", "test_rows_past_two_to_the_31st_element_are_read")
SSD_TESTS = _tests("ssd", "test_mamba_ssm_matches_recurrence_on_gpu or test_mamba_ssm_s_own_function_gives_the_same")
SSD_PART = _tests("recurrence_part", "test_a_part_by_mamba_ssm")
DELTA_RULE = _tests("delta_rule_state_pass", "test_gated_delta_rule_with_the_chain_on_a_gpu and 130")
STATE_PASS = _tests("delta_rule_state_pass", "test_chain_and_its_gradients_on_a_gpu and (777-3 or 130-2)")
LOSS = _tests("head_softmax", "test_head_loss_with_triton_equals_float64_torch and dtype0 and False")
CONV1D = _tests("causal_conv1d", "test_fla_matches_conv1d_on_gpu")
DOCUMENTS = _tests("causal_conv1d", "test_fla_keeps_documents_apart_on_gpu")
RMS_NORM = _tests("residual_norm", "test_kernels_equal_the_formula_on_a_gpu and (shape4 or shape5)")
SECTIONS = _tests("sections", "test_the_kernel_on_a_gpu")

ILLEGAL = "an illegal memory access was encountered"  # an address before the tensor, which is what the fault does
IN = " " * 8
DECAY = "state = state * factors.index(slot).slice(1, 1).slice(0, 1, dim=1).load(of_state)\n"
ADD_BIAS = "    if BIAS:\n        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)\n"
SILU = "    if SILU:\n        total = total * tl.sigmoid(total)\n"
D_AND_STATE = "D=D, initial_states=initial_state, dfinal_states"

# in the order of the times that their tests take, longest first
FAULTS: dict[str, Fault] = {
    "decode: a part's output not rescaled for a larger score": Fault(
        DECODE, "out = out * shrink[:, None] + tl.dot(", "out = out + tl.dot(", DECODING
    ),
    "decode: parts' sums added without their weights": Fault(
        DECODE, "total += weight * tl.load(sums + place * 2 + 1)", "total += tl.load(sums + place * 2 + 1)", DECODING
    ),
    "decode: parts of a packed batch not rescaled": Fault(
        DECODE, "result = result * shrink + ", "result = result + ", DECODING
    ),
    "decode: a sequence's offset in int32": Fault(
        DECODE,
        "program, split = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        "program, split = tl.program_id(0), tl.program_id(1)",
        FAR_ROWS,
        ILLEGAL,
    ),
    "decode: a row's offset in int32": Fault(DECODE, "far = row.to(tl.int64)", "far = row", FAR_ROWS, ILLEGAL),
    "matvec: SwiGLU's second half scaled as the first": Fault(
        _kernel("triton_matvec"), "tl.load(scale + rows + row,", "tl.load(scale + row,", DECODING
    ),
    "convolution step: the bias added after SiLU": Fault(CONVOLUTION_STEP, ADD_BIAS + SILU, SILU + ADD_BIAS, DECODING),
    "convolution step: the oldest input stays in the state": Fault(CONVOLUTION_STEP, "if j > 0:", "if j > 1:", DECODING),
    "delta rule step: beta without sigmoid": Fault(
        _kernel("recurrence_step"), "APPLY_BETA_SIGMOID=gates is not None", "APPLY_BETA_SIGMOID=False", DECODING
    ),
    # mamba_ssm's kernels: what they are given is ours
    "Mamba2 backward: initial state taken for zero": Fault(
        SSD,
        D_AND_STATE,
        D_AND_STATE.replace("=initial_state", "=None if initial_state is None else 0 * initial_state"),
        SSD_TESTS,
    ),
    "Mamba2 backward: gradient of the last state dropped": Fault(
        SSD, "dfinal_states=grad_last", "dfinal_states=None", SSD_TESTS
    ),
    "Mamba2 backward: documents forgotten": Fault(
        SSD, "dfinal_states=grad_last, seq_idx=documents", "dfinal_states=grad_last, seq_idx=None", SSD_TESTS
    ),
    "Mamba2 backward: dx without the skip": Fault(
        SSD, D_AND_STATE, D_AND_STATE.replace("D=D", "D=None if D is None else 0 * D"), SSD_TESTS
    ),
    "Mamba2 part: readout decayed by one token less": Fault(
        _kernel("recurrence_part"), "left = decay.cumsum(-1).exp()", "left = (decay.cumsum(-1) - decay).exp()", SSD_PART
    ),
    "state pass: the gate's gradient from the first block alone": Fault(
        _kernel("delta_rule_state_pass"), "grad_g.sum(0)", "grad_g[0]", DELTA_RULE
    ),
    "state pass: no decay between chunks": Fault(
        GLUON,
        "_wait_full(full, chunk, SLOTS)\n" + IN + DECAY,
        "_wait_full(full, chunk, SLOTS)\n" + IN + "state = state * 1.0\n",
        STATE_PASS,
    ),
    "state pass backward: sign of the term of w": Fault(GLUON, "gl.convert_layout(-new,", "gl.convert_layout(new,", STATE_PASS),
    "state pass backward: gradient of the chunk's own outputs left out": Fault(
        GLUON, ".load(of_chunk) + local.load(of_chunk)).to(dtype)", ".load(of_chunk)).to(dtype)", STATE_PASS
    ),
    "state pass backward: state decayed before the product with the keys": Fault(
        GLUON,
        "narrow = state.to(dtype)\n" + IN + "_wait_full(full, step, SLOTS)\n" + IN + DECAY,
        "_wait_full(full, step, SLOTS)\n" + IN + DECAY + IN + "narrow = state.to(dtype)\n",
        STATE_PASS,
    ),
    "state pass: a short last chunk decays as the one before it": Fault(
        GLUON,
        "tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1",
        "tl.minimum(chunk * CHUNK + CHUNK, tokens // CHUNK * CHUNK) - 1",
        STATE_PASS,
    ),
    "state pass: a chunk decays by one token less": Fault(
        GLUON, "tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1", "tl.minimum(chunk * CHUNK + CHUNK, tokens) - 2", STATE_PASS
    ),
    "state pass backward: queries decayed by exp, not exp2": Fault(
        GLUON, "factor = tl.exp2(tl.load(g + row,", "factor = tl.exp(tl.load(g + row,", STATE_PASS
    ),
    "state pass: each program begins with the first columns of the state": Fault(
        GLUON, "* DK * DV + column + value[:, None]", "* DK * DV + value[:, None]", STATE_PASS
    ),
    # fla's kernels: the history before a sequence is ours
    "convolution backward: sign of the correction": Fault(CONVOLUTION, "(upstream, -upstream)", "(upstream, upstream)", CONV1D),
    "convolution: the bias's gradient lacks the first tokens": Fault(
        CONVOLUTION, "dbias = dbias + changes[3] if", "dbias = dbias if", CONV1D
    ),
    "convolution: first outputs shifted by a token": Fault(
        CONVOLUTION, "out[:, :count] = start", "out[:, : count - 1] = start[:, 1:]", CONV1D
    ),
    "convolution: document mask off by one": Fault(
        CONVOLUTION, "(positions >= k - 1 - j)", "(positions > k - 1 - j)", DOCUMENTS
    ),
    "head loss: sum not rescaled for a larger logit": Fault(
        HEAD, "total = total * tl.exp(largest - reached) + tl.sum(p)", "total = total + tl.sum(p)", LOSS
    ),
    "head loss: KL rescaled by the student's maximum": Fault(
        HEAD, "difference = difference * shrink_q + ", "difference = difference * shrink + ", LOSS
    ),
    "head loss: reverse KL's gradient lacks the mean": Fault(
        HEAD, "(log_p - log_q - tl.load(normalisers + 3))", "(log_p - log_q)", LOSS
    ),
    "head loss: logits of 0 past the vocabulary": Fault(
        HEAD,
        'x = tl.load(student + columns, mask=inside, other=float("-inf"))',
        "x = tl.load(student + columns, mask=inside, other=0.0)",
        LOSS,
    ),
    "head loss: gradient without temperature": Fault(HEAD, "log_p = x * INVERSE_TEMPERATURE -", "log_p = x -", LOSS),
    "norm: mean of the gradient over the padded width": Fault(
        NORM,
        "along = tl.sum(weighted * normal, 1) / WIDTH",
        "along = tl.sum(weighted * normal, 1) / COLUMNS",
        RMS_NORM,
    ),
    "norm: rows counted twice in the weight's gradient": Fault(
        NORM, "there = (within < SHARE) & (row < rows)", "there = row < rows", RMS_NORM
    ),
    "sections: last column left out": Fault(
        _kernel("triton_concatenate"), "(column < WIDTHS[i])\n", "(column < WIDTHS[i] - 1)\n", SECTIONS
    ),
}
