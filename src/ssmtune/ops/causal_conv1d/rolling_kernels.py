"""Triton kernels of the causal convolution over channels that lie side by side, for few taps; the way back is in
`rolling_back_kernels`.

A program walks over the steps of one segment with the last K steps of its channels in registers, so that every input is
read once and every output written once. The rows of the next AHEAD steps are on their way while as many are computed;
the program's text asks for all of them first, since the compiler cannot tell that a store leaves them alone.

Windows are tuples of [C] fp32, or of scalars, the newest step first. Document numbers are those of `seq_idx`; where the
next AHEAD steps and their window are of one document, what crosses from one to another is not looked for.
"""

import triton
import triton.language as tl


@triton.jit
def load_taps(weight_ptr, c, num_channels, weight_c, weight_k, K: tl.constexpr):
    """The taps by their lag, fp32."""
    taps = ()
    for lag in tl.static_range(K):
        tap = tl.load(weight_ptr + c * weight_c + (K - 1 - lag) * weight_k, mask=c < num_channels, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def load_row(row_ptr, real, c, num_channels, stride_c):
    """A step's values [C] as they are stored, zero unless `real`."""
    return tl.load(row_ptr + c * stride_c, mask=c < tl.where(real, num_channels, 0), other=0.0)


@triton.jit
def load_input(row_ptr, mask_ptr, t, real, c, num_channels, x_c, HAS_MASK: tl.constexpr):
    """x at t, [C], zero unless `real` and at padding."""
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + t, mask=real, other=0) != 0)
    return load_row(row_ptr, real, c, num_channels, x_c)


@triton.jit
def load_document(seq_ptr, t, real, HAS_SEQ: tl.constexpr):
    """The number of the document of t, -1 unless `real`."""
    number = t
    if HAS_SEQ:
        number = tl.load(seq_ptr + t, mask=real, other=-1)
    return number


@triton.jit
def load_window(x_ptr, mask_ptr, seq_ptr, start, c, num_channels, x_c, x_t, K: tl.constexpr, HAS_SEQ: tl.constexpr,
                HAS_MASK: tl.constexpr):  # fmt: skip
    """The windows of inputs and of document numbers in front of `start`; the oldest place, which none will read, is filled."""
    x, documents = (), ()
    for lag in tl.static_range(1, K):
        t = start - lag
        row = load_input(x_ptr + t.to(tl.int64) * x_t, mask_ptr, t, t >= 0, c, num_channels, x_c, HAS_MASK)
        x, documents = x + (row.to(tl.float32),), documents + (load_document(seq_ptr, t, t >= 0, HAS_SEQ),)
    return x + (tl.zeros_like(c).to(tl.float32),), documents + (start,)


@triton.jit
def shift(new, window, K: tl.constexpr):
    """The window of K steps one step on."""
    shifted = (new,)
    for lag in tl.static_range(K - 1):
        shifted = shifted + (window[lag],)
    return shifted


@triton.jit
def are_of_one(documents, numbers, K: tl.constexpr, AHEAD: tl.constexpr):
    """Whether the next steps and the K - 1 in front of them are of one document."""
    one = numbers[0] == numbers[AHEAD - 1]
    for i in tl.static_range(1, AHEAD - 1):
        one = one & (numbers[i] == numbers[0])
    for lag in tl.static_range(K - 1):
        one = one & (documents[lag] == numbers[0])
    return one


@triton.jit
def within(value, document, other, CROSSES: tl.constexpr):
    """What a value is worth at another step: nothing in another document."""
    if CROSSES:
        value = tl.where(document == other, value, 0.0)
    return value


@triton.jit
def convolve(x, documents, taps, bias, K: tl.constexpr, CROSSES: tl.constexpr):
    """conv(x) + bias at the newest step, [C]."""
    acc = bias + taps[0] * x[0]
    for lag in tl.static_range(1, K):
        acc += taps[lag] * within(x[lag], documents[lag], documents[0], CROSSES)
    return acc


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)): division and `exp` would take twice the instructions, to provide for denormal numbers."""
    root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def load_steps(x_row_ptr, seq_ptr, mask_ptr, first, end, c, num_channels, x_c, x_t, HAS_SEQ: tl.constexpr,
               HAS_MASK: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """The inputs of AHEAD steps as they are stored, their document numbers, and the place of the row behind them."""
    rows, numbers = (), ()
    for i in tl.static_range(AHEAD):
        t = first + i
        rows = rows + (load_input(x_row_ptr, mask_ptr, t, t < end, c, num_channels, x_c, HAS_MASK),)
        numbers = numbers + (load_document(seq_ptr, t, t < end, HAS_SEQ),)
        x_row_ptr += x_t
    return rows, numbers, x_row_ptr


@triton.jit
def _steps(rows, numbers, x, documents, taps, bias, y_row_ptr, first, end, c, num_channels, y_c, y_t, K: tl.constexpr,
           SILU: tl.constexpr, CROSSES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Write the outputs of `rows`; return the windows behind them and the place of the next output."""
    for i in tl.static_range(AHEAD):
        x, documents = shift(rows[i].to(tl.float32), x, K), shift(numbers[i], documents, K)
        acc = convolve(x, documents, taps, bias, K, CROSSES)
        if SILU:
            acc *= sigmoid(acc)
        tl.store(y_row_ptr + c * y_c, acc, mask=c < tl.where(first + i < end, num_channels, 0))
        y_row_ptr += y_t
    return x, documents, y_row_ptr


@triton.jit(do_not_specialize=["num_steps"])
def rolling_conv_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, y_ptr, num_steps, num_channels, x_b, x_c, x_t,
                        y_b, y_c, y_t, weight_c, weight_k, K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                        HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
                        BLOCK_C: tl.constexpr):  # fmt: skip
    """Write act(conv(x) + bias). Grid (segments of STEPS steps x blocks of C, a segment's blocks side by side; batch)."""
    tl.static_assert(STEPS % AHEAD == 0)
    num_blocks, batch = tl.cdiv(num_channels, BLOCK_C), tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) // num_blocks * STEPS
    end = tl.minimum(start + STEPS, num_steps)
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    x_ptr += batch * x_b
    x_row_ptr, y_row_ptr = x_ptr + start.to(tl.int64) * x_t, y_ptr + batch * y_b + start.to(tl.int64) * y_t
    rows, numbers, x_row_ptr = load_steps(
        x_row_ptr, seq_ptr, mask_ptr, start, end, c, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK, AHEAD
    )
    x, documents = load_window(x_ptr, mask_ptr, seq_ptr, start, c, num_channels, x_c, x_t, K, HAS_SEQ, HAS_MASK)
    taps, bias = load_taps(weight_ptr, c, num_channels, weight_c, weight_k, K), tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < num_channels, other=0.0).to(tl.float32)
    for done in tl.range(0, end - start, AHEAD):
        first = start + done
        next_rows, next_numbers, x_row_ptr = load_steps(
            x_row_ptr, seq_ptr, mask_ptr, first + AHEAD, end, c, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK, AHEAD
        )
        crosses = HAS_SEQ
        if HAS_SEQ:
            crosses = not are_of_one(documents, numbers, K, AHEAD)
        if crosses:
            x, documents, y_row_ptr = _steps(rows, numbers, x, documents, taps, bias, y_row_ptr, first, end, c,
                                             num_channels, y_c, y_t, K, SILU, True, AHEAD)  # fmt: skip
        else:
            x, documents, y_row_ptr = _steps(rows, numbers, x, documents, taps, bias, y_row_ptr, first, end, c,
                                             num_channels, y_c, y_t, K, SILU, False, AHEAD)  # fmt: skip
        rows, numbers = next_rows, next_numbers
