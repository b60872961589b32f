"""The step of kernels.py as a function of C, which XLA calls by its foreign function interface.

All weights of a model are one call. It runs without Python, in a thread of XLA, and XLA's other
threads help. They are no threads of Numba: those cannot be entered from two sides at once.

The rows in memory are rows of the matrix, or its columns, as JAX keeps kernels. Columns are read
twice in an iteration: u is a sum over all of them, and v needs all of u. No order of panels avoids
that. The first column's part of the new v depends on the last column, by way of u, so all of W is
read between the two uses of an element. Where W is larger than the cache, that is a second reading
of memory. One reading would need an iteration that starts from u, and so another algorithm: its
result would differ from the reference's wherever W has changed.

Work is handed out as tickets, in the order of the stages. Whoever holds a ticket waits until the
stages before are done. Their tickets are held by threads that run, so nobody waits for a thread
that has not started. A helper that XLA starts too late finds no ticket, and leaves.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .kernels import (
    AT_MOST,
    FRESH,
    FRESH_64,
    _add,
    _adjoint_times_turned,
    _compiled,
    _force,
    _fraction,
    _inverse,
    _length,
    _multiply,
    _normalize,
    _pointer,
    _read,
    _scale,
    _sum_parts,
    _times_turned,
)

# Numba puts the code of such a function into its caller. Each level of calls is optimized anew,
# with all that is below it: with fewer levels, the kernels compile faster.
_inlined = partial(_compiled, inline="always")

# The columns of the table of matrices: rows and columns in memory; 1 if these rows are columns of
# the matrix; kernel positions that come before the channels in memory, but after them in v; first
# chunk; place in the room; code of the penalty or bound; 1 if there is a gradient; vectors.
WIDTH = 9
_ROWS, _COLUMNS, _ACROSS, _WINDOW, _CHUNK, _PLACE, _CODE, _CHANGES, _VECTORS = range(WIDTH)

# The numbers before the tables: matrices, chunks, matrices of several chunks, these chunks,
# iterations, and the most helpers that the work is worth.
HEAD, _HELPERS = 6, 5

# Words of the control block that the threads of a call share.
_NEXT, _DONE, _USERS, _FRAME, _TOTAL = range(5)

# XLA's structures, in words of 8 bytes: see xla/ffi/api/c_api.h.
_FRAME_WORDS, _API, _CONTEXT = 21, 2, 3
_ARGS, _RETS, _ATTRS = 9, 14, 20
_DATA, _DIMS = 3, 5
_DESTROY_ERROR, _SCHEDULE, _COUNT_THREADS = 8, 17, 18
_METADATA = 1


@intrinsic
def _add_atomically(_, address, value):  # noqa: ARG001
    """Add to the word at an address, and return what it was."""

    def codegen(__, builder, ___, args):
        word = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", word, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _call(_, function, argument):  # noqa: ARG001
    """Call the function at an address with one pointer."""

    def codegen(__, builder, ___, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [args[1]])

    return types.int64(types.int64, types.int64), codegen


def _symbol(name: str, kind: Any) -> Any:
    """Return an intrinsic for the address of a symbol, or for a call of it with one word."""

    @intrinsic
    def found(_, argument):  # noqa: ARG001
        def codegen(__, builder, ___, args):
            word, module = ir.IntType(64), builder.module
            signature = ir.FunctionType(word, [word])
            function = module.globals.get(name) or ir.Function(module, signature, name)
            if kind == "address":
                return builder.ptrtoint(function, word)
            return builder.call(function, [args[0]])

        return types.int64(types.int64), codegen

    return found


_malloc, _free = _symbol("malloc", "call"), _symbol("free", "call")


@_compiled
def _words(address, count):
    """Return words in memory."""
    return carray(_pointer(address), (count,), np.int64)


@_compiled
def _data(buffers, i):
    """Return the address of the data of one of XLA's buffers."""
    return _words(_words(buffers, i + 1)[i], _DATA + 1)[_DATA]


@_compiled
def _vector(address, size, like):
    """Return a vector in memory."""
    return carray(_pointer(address), (size,), like.dtype)


@_compiled
def _matrix(k, which, table, arrays):
    """Return the weight or the gradient of a matrix, as it is in memory."""
    shape = table[0][k, _ROWS], table[0][k, _COLUMNS]
    return carray(_pointer(arrays[0][k, which]), shape, arrays[2].dtype)


@_compiled
def _vectors(k, table, arrays):
    """Return v, u, σ, v in the order of memory, and room for the next one."""
    matrices, addresses, room = table[0], arrays[0], arrays[1]
    m, n, place = matrices[k, _ROWS], matrices[k, _COLUMNS], matrices[k, _PLACE]
    if matrices[k, _ACROSS]:
        m, n = n, m
    return (
        _vector(addresses[k, 2], n, room),
        _vector(addresses[k, 3], m, room),
        _vector(addresses[k, 4], 1, room),
        room[place : place + n],
        room[place + n : place + 2 * n],
    )


@_inlined
def _begin(k, table, arrays):
    """Store v in the order of memory, plus the core's `fresh_direction`."""
    v, _, _, start, _ = _vectors(k, table, arrays)
    largest = FRESH if start.itemsize == 4 else FRESH_64
    scale = start.dtype.type(largest / 2**31)
    window = table[0][k, _WINDOW]
    channels = v.size // window
    for i in range(window):
        for c in range(channels):
            j = c * window + i
            start[i * channels + c] = v[j] + start.dtype.type(_fraction(j)) * scale


@_inlined
def _first(p, table, arrays):
    """Compute the first product of a chunk; of rows of the matrix, the second too."""
    chunks, room = table[1], arrays[1]
    k, lo, hi, place = chunks[p, 0], chunks[p, 1], chunks[p, 2], chunks[p, 3]
    _, u, _, start, _ = _vectors(k, table, arrays)
    W, part = _matrix(k, 0, table, arrays), room[place : place + table[0][k, _COLUMNS]]
    if table[0][k, _ACROSS]:
        _times_turned(W, start, part, lo, hi)
    else:
        _read(W, start, u, part, lo, hi)


@_compiled
def _left(parts, u):
    """Make the unit vector u of the sum of the parts."""
    for j in range(u.size):
        u[j] = parts[j]
    for other in range(u.size, parts.size, u.size):
        for j in range(u.size):
            u[j] += parts[other + j]
    inverse = _inverse(_length(u))
    for j in range(u.size):
        u[j] *= inverse


@_inlined
def _between(k, table, arrays):
    """Make u of columns of the matrix from the sums of their chunks."""
    matrices, chunks = table[0], table[1]
    if matrices[k, _ACROSS]:
        _, u, _, _, _ = _vectors(k, table, arrays)
        place, count = chunks[matrices[k, _CHUNK], 3], matrices[k + 1, _CHUNK] - matrices[k, _CHUNK]
        _left(arrays[1][place : place + count * u.size], u)


@_inlined
def _second(p, table, arrays):
    """Compute the second product of a chunk of columns of the matrix."""
    chunks = table[1]
    k = chunks[p, 0]
    if table[0][k, _ACROSS]:
        _, u, _, _, after = _vectors(k, table, arrays)
        _adjoint_times_turned(_matrix(k, 0, table, arrays), u, after, chunks[p, 1], chunks[p, 2])


@_inlined
def _end(k, table, arrays):
    """Store σ, v and, for rows of the matrix, u."""
    matrices, chunks = table[0], table[1]
    v, u, sigma, start, after = _vectors(k, table, arrays)
    if not matrices[k, _ACROSS]:
        place, count = chunks[matrices[k, _CHUNK], 3], matrices[k + 1, _CHUNK] - matrices[k, _CHUNK]
        after = arrays[1][place : place + count * v.size]
        _sum_parts(after, v.size)
    # The u of columns is a unit vector by now, which this leaves as it is.
    inverse = _inverse(_length(u))
    for i in range(u.size):
        u[i] *= inverse
    for j in range(v.size):
        after[j] *= inverse
    sigma[0] = _normalize(after[: v.size], v, start, matrices[k, _WINDOW])


@_compiled
def _change(p, table, arrays):
    """Add the term to a chunk of the gradient, or scale a chunk of the weight."""
    matrices, chunks, numbers = table[0], table[1], arrays[3]
    k, lo, hi = chunks[p, 0], chunks[p, 1], chunks[p, 2]
    _, u, sigma, start, _ = _vectors(k, table, arrays)
    G, target, code = _matrix(k, 1, table, arrays), numbers[k, 1], matrices[k, _CODE]
    if code >= AT_MOST:
        factor = _scale(sigma[0], target, code)
        if factor != 1:  # a bound that does not act leaves the weight in peace
            _multiply(G, factor, lo, hi)
        return
    weight = np.float64(numbers[k, 0] * _force(sigma[0], target, np.float64(code)))
    x, y = (start, u) if matrices[k, _ACROSS] else (u, start)
    _add(G, x, y, weight, lo, hi)


@_inlined
def _last(k, table, arrays):
    """Give a bounded weight the sigma that it has been scaled to."""
    code = table[0][k, _CODE]
    if code >= AT_MOST:
        _, _, sigma, _, _ = _vectors(k, table, arrays)
        sigma[0] *= _scale(sigma[0], arrays[3][k, 1], code)


@_inlined
def _stage(stage, first, end, k, table, arrays):
    """Work on the chunks from ``first`` to ``end``, or on matrix k, which has one vector."""
    if stage == 0:
        _begin(k, table, arrays)
    elif stage == 1:
        for p in range(first, end):
            _first(p, table, arrays)
    elif stage == 2:
        _between(k, table, arrays)
    elif stage == 3:
        for p in range(first, end):
            _second(p, table, arrays)
    elif stage == 4:
        _end(k, table, arrays)
    elif stage == 5:
        for p in range(first, end):
            if table[0][table[1][p, 0], _CHANGES]:
                _change(p, table, arrays)
    else:
        _last(k, table, arrays)


@_compiled
def _stage_of(turn, n_iter):
    """Return the stage of a turn: the stages of an iteration repeat."""
    if turn == 0:
        return 0
    return (turn - 1) % 4 + 1 if turn <= 4 * n_iter else turn - 4 * n_iter + 4


@_compiled
def _wait(control, count):
    """Wait until as many tickets are done."""
    while _add_atomically(control + 8 * _DONE, 0) < count:
        pass


@_compiled
def _turn_of(ticket, head):
    """Return the turn of a ticket for a shared matrix, and the first ticket of the turn."""
    start, turn = head[0] - head[2], 0
    while True:
        size = head[3] if _stage_of(turn, head[4]) % 2 == 1 else head[2]
        if ticket < start + size:
            return turn, start
        start += size
        turn += 1


@_inlined
def _work(stage, control, head, table, arrays, ticket):
    """Do the work of a ticket: a part of one turn, or all turns of a matrix of one chunk.

    ``stage`` is the function that works: `_stage` for one vector.
    """
    shared, n_iter = head[2], head[4]
    if ticket < head[0] - shared:  # in one go, while the matrix is in the cache
        k, turn, turns = shared + ticket, 0, 4 * n_iter + 3
        first, end = table[0][k, _CHUNK], table[0][k + 1, _CHUNK]
    else:
        turn, start = _turn_of(ticket, head)
        _wait(control, start)
        k = first = ticket - start
        turns, end = turn + 1, first + 1
    while turn < turns:
        stage(_stage_of(turn, n_iter), first, end, k, table, arrays)
        turn += 1


@_inlined
def _help(stage, control, like, vectors):
    """Work on tickets until there are no more; then free the control block if all have left."""
    words = _words(control, 5)
    total = words[_TOTAL]
    ticket = _add_atomically(control, 1)
    if ticket < total:  # the call waits for this ticket, so its memory is there
        head, table, arrays = _unpacked(words[_FRAME], like, vectors)
        while ticket < total:
            _work(stage, control, head, table, arrays, ticket)
            _add_atomically(control + 8 * _DONE, 1)
            ticket = _add_atomically(control, 1)


@_compiled
def _leave(control):
    """Free the control block if all others have left it."""
    if _add_atomically(control + 8 * _USERS, -1) == 1:
        _free(control)


@_compiled
def _unpacked(frame, like, vectors):
    """Return the head, the tables and the arrays of a call.

    Its operands are the numbers, and W, V and, if there is one, the gradient of each matrix. Its
    results are the room, and V, u, σ and the gradient.
    """
    words = _words(frame, _FRAME_WORDS)
    args, rets = words[_ARGS], words[_RETS]
    array = _words(_words(words[_ATTRS], 1)[0], 3)
    numbers = _words(array[2], array[1])
    head = numbers[:HEAD]
    count, pieces = head[0], head[1]
    end = HEAD + (count + 1) * WIDTH
    matrices = numbers[HEAD:end].reshape((count + 1, WIDTH))
    chunks = numbers[end:].reshape((pieces, 4))
    addresses = np.empty((count, 5), np.int64)
    arg = ret = 1
    for k in range(count):
        addresses[k, 0], addresses[k, 1] = _data(args, arg), 0
        addresses[k, 2], addresses[k, 3] = _data(rets, ret), _data(rets, ret + 1)
        addresses[k, 4] = _data(rets, ret + 2)
        if matrices[k, _CHANGES]:
            addresses[k, 1] = _data(rets, ret + 3)
        # A bound changes the weight, whose memory is that of the result: there is no gradient.
        arg += 2 + (matrices[k, _CHANGES] and matrices[k, _CODE] < AT_MOST)
        ret += 3 + matrices[k, _CHANGES]
    size = _words(_words(_words(rets, 1)[0], _DIMS + 1)[_DIMS], 1)[0]
    room = _vector(_data(rets, 0), size, vectors)
    factors = carray(_pointer(_data(args, 0)), (count, 2), vectors.dtype)
    return head, (matrices, chunks), (addresses, room, like, factors)


@_compiled
def _forget(api, error):
    """Destroy an error of XLA; return True if there was one."""
    if error != 0:
        request = _malloc(24)
        words = _words(request, 3)
        words[0], words[1], words[2] = 24, 0, error
        _call(_words(api, _DESTROY_ERROR + 1)[_DESTROY_ERROR], request)
        _free(request)
    return error != 0


@_compiled
def _threads(frame):
    """Return the number of XLA's threads, this one included."""
    words = _words(frame, _CONTEXT + 1)
    request = _malloc(40)
    asked = _words(request, 5)
    asked[0], asked[1], asked[2], asked[3] = 32, 0, words[_CONTEXT], request + 32
    function = _words(words[_API], _COUNT_THREADS + 1)[_COUNT_THREADS]
    failed = _forget(words[_API], _call(function, request))
    count = 1 if failed else asked[4]
    _free(request)
    return count


@_compiled
def _start_helpers(frame, control, task, count):
    """Ask XLA to run the task in more threads, as many as its pool accepts."""
    words = _words(frame, _CONTEXT + 1)
    function = _words(words[_API], _SCHEDULE + 1)[_SCHEDULE]
    request = _malloc(40)
    asked = _words(request, 5)
    asked[0], asked[1], asked[2], asked[3], asked[4] = 40, 0, words[_CONTEXT], task, control
    for _ in range(count):
        _add_atomically(control + 8 * _USERS, 1)
        if _forget(words[_API], _call(function, request)):
            _leave(control)
            break
    _free(request)


@_compiled
def _answer(frame):
    """Answer XLA if it asks for the version of its interface; return True if it does."""
    extension = _words(frame, 2)[1]
    if extension == 0 or _words(extension, 2)[1] & 0xFFFFFFFF != _METADATA:
        return False
    version = carray(_pointer(_words(extension, 4)[3] + 24), (2,), np.int32)
    version[0], version[1] = 0, 1
    return True


@_compiled
def _run(frame, task):
    """Run the step of a call, with the help of XLA's other threads; return 0, for no error."""
    if _answer(frame):
        return 0
    words = _words(frame, _FRAME_WORDS)
    array = _words(_words(words[_ATTRS], 1)[0], 3)
    head = _words(array[2], HEAD)
    count, shared, pieces, n_iter = head[0], head[2], head[3], head[4]
    control = _malloc(40)
    words = _words(control, 5)
    # Odd stages work on chunks: 1 and 3 of each iteration, and 5.
    total = count - shared + (2 * n_iter + 1) * pieces + (2 * n_iter + 2) * shared
    words[_NEXT], words[_DONE], words[_USERS] = 0, 0, 2
    words[_FRAME], words[_TOTAL] = frame, total
    if head[_HELPERS] > 0:
        _start_helpers(frame, control, task, min(_threads(frame) - 1, head[_HELPERS]))
    _call(task, control)
    _wait(control, total)
    _leave(control)
    return 0


# These functions are spelled out, here and for several vectors. A factory would return closures
# over a compiled function. Numba keys a closure's code on disk by what the closure holds, and a
# compiled function has a new key in each process: the kernels would be compiled anew in each.


def _float32_task(control):
    vectors = carray(_pointer(control), (0,), np.float32)
    _help(_stage, control, vectors, vectors)
    _leave(control)


def _float64_task(control):
    vectors = carray(_pointer(control), (0,), np.float64)
    _help(_stage, control, vectors, vectors)
    _leave(control)


def _bfloat16_task(control):
    like = carray(_pointer(control), (0,), np.uint16)
    _help(_stage, control, like, carray(_pointer(control), (0,), np.float32))
    _leave(control)


def _float16_task(control):
    like = carray(_pointer(control), (0,), np.int16)
    _help(_stage, control, like, carray(_pointer(control), (0,), np.float32))
    _leave(control)


# Addresses differ from process to process, but the code on disk knows a name.
_TASK_NAME = "spectral_core_xla_task_"
_float32_address = _symbol(_TASK_NAME + "float32", "address")
_float64_address = _symbol(_TASK_NAME + "float64", "address")
_bfloat16_address = _symbol(_TASK_NAME + "bfloat16", "address")
_float16_address = _symbol(_TASK_NAME + "float16", "address")


def _float32_step(frame):
    return _run(frame, _float32_address(0))


def _float64_step(frame):
    return _run(frame, _float64_address(0))


def _bfloat16_step(frame):
    return _run(frame, _bfloat16_address(0))


def _float16_step(frame):
    return _run(frame, _float16_address(0))


_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "float32": (_float32_task, _float32_step),
    "float64": (_float64_task, _float64_step),
    "bfloat16": (_bfloat16_task, _bfloat16_step),
    "float16": (_float16_task, _float16_step),
}


@lru_cache
def compiled(kind: str) -> Any:
    """Return the compiled step for weights of a dtype: its attribute ``address`` is for XLA."""
    return handler(_TASK_NAME + kind, *_FUNCTIONS[kind])


def handler(name: str, task: Callable[..., Any], step: Callable[..., Any]) -> Any:
    """Return the compiled step, whose code knows the task by this name."""
    compiled_task = _as_c(types.void(types.intp), task)
    binding.add_symbol(name, compiled_task.address)
    _KEPT.append(compiled_task)
    return _as_c(types.intp(types.intp), step)


_KEPT: list[Any] = []  # else their code could be freed


def _as_c(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile with ``cfunc``, and keep the result on disk where a folder is writeable."""
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:
        return cfunc(signature)(function)
