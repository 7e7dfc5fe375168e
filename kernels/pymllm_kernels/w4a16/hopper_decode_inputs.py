"""How the W4A16 kernel for few tokens on Hopper comes by its activations.

Several tokens are read from memory, a block of K a warp and step. One token that is not long is kept in
shared memory: asked for before the first weights, which are on their way while it is stored. Of a layer in
act-order it is put in order on this way, by every program for itself: a kernel for that takes longer to
start and to end than the gathering. Reads of single values are on any of the 32 banks: 32 of them take 3
to 4 cycles, for all of K on every multiprocessor. For further tokens that would be longer than the other
kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pymllm_kernels.common.gluon_hopper import reinterpreted, sync_threads

_RAISE = "{ .reg .b32 c; mov.b32 c, BY; mul.rn.bf16x2 $0, $1, c; }"
_RAISE_EVEN = gl.constexpr(_RAISE.replace("BY", "0x5F805F80"))  # 2**64
_RAISE_ODD = gl.constexpr(_RAISE.replace("BY", "0x5D805D80"))  # 2**60


@gluon.jit
def load_x(x_ptr, block, g, c, M, pieces, stride_x8, TILES: gl.constexpr):
    """Pairs of one block of K a warp: 4 slices for every tile of 8 tokens."""
    pair = gl.expand_dims(block * 64, 2) + c
    eight = gl.expand_dims(block * 16, 2) + c // 4
    xs = ()
    for n in gl.static_range(TILES):
        token = gl.expand_dims(g + n * 8, 2)
        row = x_ptr.to(gl.pointer_type(gl.int32)) + (token * (stride_x8 * 4) + pair)
        for j in gl.static_range(4):
            # Within K by pieces of 8 inputs, so that one load takes a piece.
            inside = (token < M) & (eight < pieces - j * 4)
            xs += (gl.load(row + j * 16, mask=inside, other=0),)
    return xs


@gluon.jit
def _raise(x, ODD: gl.constexpr):
    asm: gl.constexpr = _RAISE_ODD if ODD else _RAISE_EVEN
    return gl.inline_asm_elementwise(asm, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def raised(loaded, HALF: gl.constexpr):
    """What ``load_x`` loaded, as the products take it."""
    xs = ()
    for i in gl.static_range(len(loaded)):
        if HALF == gl.bfloat16:
            xs += (_raise(loaded[i], i % 2 == 1),)
        else:
            xs += (loaded[i],)
    return xs


@gluon.jit
def load_token(x_ptr, K, ROW: gl.constexpr, WARPS: gl.constexpr):
    """Asks for a token ``[ROW]``, zeros from K on."""
    # 16 bytes a load. LLVM joins the gathering's stores of up to 16 values a thread to 16 bytes; of more
    # it makes pairs, of which lanes 16 bytes apart meet in the banks, neighbours do not.
    NEIGHBOURS: gl.constexpr = 8 if ROW <= 16 * 32 * WARPS else 2
    OF_VALUES: gl.constexpr = gl.BlockedLayout([NEIGHBOURS], [32], [WARPS], [0])
    k = gl.arange(0, ROW, layout=OF_VALUES)
    return gl.load(x_ptr + k, mask=k // 8 < K // 8, other=0.0)


@gluon.jit
def load_order(perm_ptr, K, ROW: gl.constexpr, WARPS: gl.constexpr):
    """Asks for the input at each column of the weight ``[ROW]``."""
    OF_COLUMNS: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    column = gl.arange(0, ROW, layout=OF_COLUMNS)
    # Columns beyond K are zeros as the last value is, which is beyond K if any is.
    return gl.load(perm_ptr + column, mask=column // 8 < K // 8, other=ROW - 1)


@gluon.jit
def kept(token, HALF: gl.constexpr, WARPS: gl.constexpr, ROW_WARPS: gl.constexpr):
    """The token in shared memory, as the products take it.

    Pairs by steps: ``[steps, warps that share K, 4 slices, 1, 16]``.
    """
    ROW: gl.constexpr = token.shape[0]
    K_WARPS: gl.constexpr = WARPS // ROW_WARPS
    if HALF == gl.bfloat16:
        column = gl.arange(0, ROW, layout=token.type.layout)
        # Codes of slices 1 and 3 are times 16 already.
        token = token * gl.where(column // 32 % 2 == 1, 2.0**60, 2.0**64).to(gl.bfloat16)
    memory = gl.allocate_shared_memory(HALF, [ROW], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    memory.store(token)
    # Once: the compiler would put it before the first read, in every step.
    sync_threads()
    STEPS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    return reinterpreted(memory, gl.int32, [ROW // (K_WARPS * 128), K_WARPS, 4, 1, 16], STEPS)


@gluon.jit
def load_step(row, k, L3: gl.constexpr, WARPS: gl.constexpr, ROW_WARPS: gl.constexpr):
    """Pairs of one block of K a warp: 4 slices, the one token in the place of each of 8.

    Columns of a product do not depend on each other, and only the first is stored.
    """
    K_WARPS: gl.constexpr = WARPS // ROW_WARPS
    # Warp ``w * ROW_WARPS + r`` has block w of K.
    L4: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 4], [1, 1, 8, 4], [K_WARPS, ROW_WARPS, 1, 1], [3, 2, 1, 0]
    )
    all_places = gl.zeros([K_WARPS, ROW_WARPS, 8, 16], gl.int32, L4)
    step = row.index(k)
    xs = ()
    for j in gl.static_range(4):
        one = step.slice(j, 1, dim=1).load(L4)
        one = gl.broadcast(one, all_places)[0].reshape(WARPS, 8, 16)
        xs += (gl.convert_layout(one, L3, assert_trivial=True),)
    return xs
