// Algorithm 1, lines 7-9, of many matrices in a fixed number of launches.
//
// rows     reads each weight once. Threads hold a tile of W, X = V W^T of its rows is summed over
//          them, and from the same registers they add X W of these rows to their running sums.
// columns  sums what the blocks of `rows` have found, 32 columns a block: y = W^T x / |x|.
// apply    u = x / |x|, sigma = |y|, v = y / |y|, G += factor slope(sigma) u v^T.
//
// With several vectors, `finish` is between `columns` and `apply`: one block a matrix.
//
// Tables made by the host (_engine.py) say which block works on what. A sum has the same order in
// every run: there are no atomics. The host defines the types before this text:
//
// SPECTRAL_WEIGHT, SPECTRAL_GRAD  as they are stored
// SPECTRAL_REAL                   of the iteration: float, or double for double weights
// SPECTRAL_SUM                    in which a gradient's sum is computed, then rounded once
// SPECTRAL_TINY, SPECTRAL_EPS     the smallest normal number of SPECTRAL_REAL, and its precision
// SPECTRAL_VECTORS                rows of V
// SPECTRAL_HALF                   if one of the types is half
//
// Nothing here relies on subnormal numbers: CuPy compiles with -ftz=true.

#ifdef SPECTRAL_HALF
#include <cuda_fp16.h>
#endif

typedef long long Int;
typedef SPECTRAL_WEIGHT Weight;
typedef SPECTRAL_GRAD Grad;
typedef SPECTRAL_REAL Real;
typedef SPECTRAL_SUM Sum;

#define THREADS 512
#define WARP 32
#define WARPS (THREADS / WARP)
// Blocks on a multiprocessor at once. A thread of `rows` needs 128 registers, so that v, the sums and
// a tile stay in them; 16 warps with 128 bytes of W each on their way are enough to hide the latency.
#define ROWS_BLOCKS 1
#define APPLY_BLOCKS 2
#define BATCH 4  // 16-byte loads of a gradient that are issued before the first is used

// The largest element of the core's `fresh_direction`, 2^-20 or in float64 2^-27, over 2^31.
#define FRESH_SCALE static_cast<Real>(sizeof(Real) == 4 ? 4.440892098500626e-16 : 3.469446951953614e-18)

// Codes of a bound in a row of the table of jobs.
#define AT_MOST 3
#define EXACTLY 4

// Flags of a launch.
#define FIRST 1  // V is the caller's; later iterations read that of the iteration before
#define ITERATED 2  // there was an iteration: (sigma, u, V) come from the scratch and go to the results
#define ADD 4    // change the gradients
#define AGAIN 8  // only matrices of several vectors that `finish` wants to be read a second time

// A row of the host's table of jobs. Addresses of vectors are in bytes, relative to `came`. `grad`
// is 0 if there is no gradient. `factor` and `target` are the bits of a double where their size is
// 0, else the address of a number of that size. Code 0 is the paper's penalty, 1 and 2 are the powers
// of others. With a bound `grad` is the weight itself.
struct Row {
    Int weight, grad, factor_size, factor, target_size, target, code, v, u, sigma;
};

// A row of the host's table of matrices. Places are in elements of the scratch or the results.
struct Matrix {
    Int job, entry;                    // its place in the job's stack
    Int rows, columns;
    Int channels, window;              // see `in_v`
    Int block_rows, span, warps;       // span: columns a thread holds, 0 for any; warps share a row
    Int row_block, row_blocks;         // the first of its blocks in `rows`, their number
    Int column_block, column_blocks;   // the same in `columns`
    Int apply_block, apply_rows;       // the first in `apply`, the rows of each
    Int x, y, start, partial;          // start: of several vectors, V as `rows` reads it
    Int x_squares, x_scales, y_squares, of_x;
    Int out_u, out_v, out_sigma;
};

#define PARAMETERS                                                                          \
    const Row *__restrict__ jobs, const Matrix *__restrict__ matrices,                      \
        const Int *__restrict__ work, const char *came, Real *out, Real *scratch, Int flags

static __device__ __forceinline__ Real real(float x) { return static_cast<Real>(x); }
static __device__ __forceinline__ double real(double x) { return x; }
static __device__ __forceinline__ Sum wide(float x) { return static_cast<Sum>(x); }
static __device__ __forceinline__ double wide(double x) { return x; }
#ifdef SPECTRAL_HALF
static __device__ __forceinline__ Real real(__half x) { return real(__half2float(x)); }
static __device__ __forceinline__ Sum wide(__half x) { return wide(__half2float(x)); }
#endif

static __device__ __forceinline__ Real absolute(Real x) { return x < 0 ? -x : x; }

// Elements that are loaded and stored at once, by one instruction of up to 16 bytes.
template <class T, int N> struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

static __device__ __forceinline__ bool aligned(const void *address, int bytes)
{
    return reinterpret_cast<Int>(address) % bytes == 0;
}

// Vectors, and the next power of two: sums of several values are exchanged by halves.
constexpr int K = SPECTRAL_VECTORS;
constexpr int K2 = K > 4 ? 8 : K > 2 ? 4 : K;

// A thread has room for 128 bytes of running sums: LEAST columns of all vectors, twice or four times
// that number. With fewer columns it holds more rows at once. Doubles need registers in pairs.
constexpr int ROOM = 128 / sizeof(Real);
constexpr int MOST = ROOM / K2 / (K == 1 && sizeof(Real) == 8 ? 2 : 1);
constexpr int LEAST = ROOM / K2 < ROOM / 4 ? ROOM / K2 : ROOM / 4;
constexpr int WIDER = MOST < 2 * LEAST ? LEAST : 2 * LEAST;
constexpr int WIDEST = MOST < 4 * LEAST ? LEAST : 4 * LEAST;
constexpr int WEIGHTS = 16 / sizeof(Weight) < LEAST ? 16 / sizeof(Weight) : LEAST;  // of a load
constexpr int GRADS = 16 / sizeof(Grad);
constexpr int REALS = 16 / sizeof(Real);
constexpr int VALUES = 32;  // products of a warp's rows and vectors, one a lane

// Rows that a thread holds at once: 128 bytes of W on their way, or 64 with several vectors, since
// their products need registers too. Single loads need more registers than packs do.
template <int C, int E> struct Rows {
    static constexpr int bytes = C * sizeof(Weight);
    static constexpr int by_bytes = (K == 1 ? 128 : 64) / bytes;
    static constexpr int most = K == 1 && C == MOST ? 1 : 8;
    static constexpr int by_products = ROOM / K2 < most ? ROOM / K2 : most;
    static constexpr int packs = by_bytes < by_products ? by_bytes : by_products;
    static constexpr int at_once = E > 1 || packs == 1 ? packs : packs / 2;
};

// Return the place in v of a column in memory. A channels-last convolution has the columns of its
// matrix in another order in memory: kernel positions first. To permute v costs nothing; to permute W
// would be a copy of it. The window is 1 where memory has the order of v.
static __device__ __forceinline__ int in_v(const Matrix &M, int j)
{
    if (M.window == 1) return j;
    const int channels = M.channels;
    return j % channels * static_cast<int>(M.window) + j / channels;
}

// Wait for the warps that share a row: bar.sync has 16 barriers, of which __syncthreads is the first.
#ifndef SPECTRAL_EMULATED
static __device__ __forceinline__ void wait_for_group(int group, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(threads) : "memory");
}
#endif

// Return the sum over the lanes of a warp, all of which call it.
template <class T> static __device__ __forceinline__ T warp_sum(T value)
{
#pragma unroll
    for (int other = WARP / 2; other > 0; other /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, other);
    return value;
}

// Return the sum over the block in each thread of it.
static __device__ __forceinline__ Real block_sum(Real value)
{
    __shared__ Real of_warp[WARPS];
    value = warp_sum(value);
    __syncthreads();  // for threads that still read the sum before
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    Real total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += of_warp[warp];
    return total;
}

static __device__ __forceinline__ Real total(const Real *values, int count)
{
    Real sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += values[i];
    return block_sum(sum);
}

// Return 1/|x| from |x|^2, as the core: zero for zero, NaN where the square is not finite.
static __device__ __forceinline__ Real inverse_length(Real square)
{
    return sqrt(square) / (square + static_cast<Real>(SPECTRAL_TINY));
}

static __device__ __forceinline__ const Real *came_vector(const char *came, Int bytes, Int elements)
{
    return reinterpret_cast<const Real *>(came + bytes) + elements;
}

// Return V as an iteration finds it.
static __device__ __forceinline__ const Real *old_rows(
    const Row &job, const Matrix &M, const char *came, const Real *out, Int flags)
{
    return flags & FIRST ? came_vector(came, job.v, M.entry * K * M.columns) : out + M.out_v;
}

// Return an element of the core's `fresh_direction` over its scale: computed, so nothing is read.
static __device__ __forceinline__ Real fresh(int j)
{
    const unsigned place = static_cast<unsigned>(j) + 1u;
    return static_cast<Real>(static_cast<int>(place * place * 0x9E3779B1u));
}

// What all threads of a group know: which rows of which matrix, and where V is.
struct Part {
    const Matrix &M;
    const Weight *W;  // the first row of the block
    const Real *v;
    Real of_fresh;  // v is that in memory plus this times the fresh direction; 0 after the first
    Real *x;        // of the first row
    int height, n, member, width;
    bool packed;  // v has the order and alignment of a tile
};

// What the threads of a block of `rows` share.
struct Shared {
    Real parts[2][WARPS][VALUES];
    Real products[WARPS][VALUES];
    Real sums[WEIGHTS][THREADS];
    Real scales[WARPS];
};

__shared__ Shared shared;

template <int C, int E, int R> struct Tile {
    Pack<Weight, E> at[R][C / E];

    // Load these rows of the columns from `base` on. What is outside of the matrix is zero.
    __device__ __forceinline__ void load(const Part &part, int top, int base)
    {
        const Weight *from = part.W + static_cast<Int>(top) * part.n + base + part.member * E;
#pragma unroll
        for (int r = 0; r < R; ++r, from += part.n) {
#pragma unroll
            for (int c = 0; c < C / E; ++c) {
                const int past = c * part.width * E;
                at[r][c] = Pack<Weight, E>();
                if (top + r < part.height && base + part.member * E + past < part.n)
                    at[r][c] = *reinterpret_cast<const Pack<Weight, E> *>(from + past);
            }
        }
    }
};

// Return an element of v as the iteration starts from it. That of several vectors is in memory, in
// the order of W's columns; one vector is read once, and so it needs no copy.
static __device__ __forceinline__ Real started(const Part &part, Real v, int place)
{
    return K > 1 ? v : v + part.of_fresh * fresh(place);
}

// Return the elements of a row of V that a load of E columns from j on meets.
template <int E>
static __device__ __forceinline__ void load_v(const Part &part, int k, int j, Real *to)
{
    const Real *row = part.v + static_cast<Int>(k) * part.n;
    if (E % REALS == 0 && (K > 1 || part.packed)) {
#pragma unroll
        for (int e = 0; e < E; e += REALS) {
            const Pack<Real, REALS> some = j < part.n
                ? *reinterpret_cast<const Pack<Real, REALS> *>(row + j + e) : Pack<Real, REALS>();
#pragma unroll
            for (int i = 0; i < REALS; ++i)
                if (e + i < E) to[e + i] = started(part, some.at[i], j + e + i);
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) {
        const int place = K > 1 ? j + e : in_v(part.M, j + e);
        to[e] = j < part.n ? started(part, row[place], place) : 0;
    }
}

// Add the products of a tile's rows and the rows of V to x. One vector's part of v is in registers
// already; several are loaded anew, from the nearest cache, for each tile.
template <int C, int E, int R>
static __device__ __forceinline__ void multiply(
    const Part &part, const Tile<C, E, R> &tile, const Real *mine, int base, Real (&x)[K2 * R])
{
#pragma unroll
    for (int c = 0; c < C / E; ++c) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            Real v[E];
            if (mine) {
#pragma unroll
                for (int e = 0; e < E; ++e) v[e] = mine[c * E + e];
            } else {
                load_v<E>(part, k, base + (c * part.width + part.member) * E, v);
            }
#pragma unroll
            for (int e = 0; e < E; ++e)
#pragma unroll
                for (int r = 0; r < R; ++r) x[k * R + r] += real(tile.at[r][c].at[e]) * v[e];
        }
    }
}

// Sum x over the threads of a group, and return the lane's own value: that of place `lane % N`.
//
// The lanes of a warp exchange halves: first each gives the half of its values that the other lane
// will sum. This needs N shuffles in place of 5 N. The sums of warps then meet in shared memory, in
// two places that take turns, so one barrier a tile is enough.
template <int N>
static __device__ __forceinline__ Real sum_over_group(
    Real (&x)[N], int turn, int warps)
{
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const Real give = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, give, half);
        }
    }
    Real sum = x[0];
#pragma unroll
    for (int other = WARP / 2; other >= N; other /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (warps > 1) {
        const int first = warp / warps * warps;
        if (lane < N) shared.parts[turn][warp][lane] = sum;
        wait_for_group(warp / warps, warps * WARP);
        sum = 0;
        for (int w = first; w < first + warps; ++w) sum += shared.parts[turn][w][lane % N];
    }
    if (lane < N) shared.products[warp][lane] = sum;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = shared.products[warp][i];
    __syncwarp();
    return sum;
}

// Store the products of a tile and return the lane's share of their squares.
template <int R>
static __device__ __forceinline__ Real store(const Part &part, int top, Real sum)
{
    const int lane = threadIdx.x % WARP, row = top + lane % R;
    const bool mine = part.member < WARP && lane < K * R && row < part.height;
    if (mine) part.x[lane / R * part.M.rows + row] = sum;
    return mine ? sum * sum : 0;
}

// Load what an earlier reading of W has left as x.
template <int R>
static __device__ __forceinline__ void load(const Part &part, int top, Real (&x)[K2 * R])
{
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
        for (int r = 0; r < R; ++r)
            if (top + r < part.height) x[k * R + r] = part.x[k * part.M.rows + top + r];
}

// X W has the size of sigma squared, which can leave the range of float32 where sigma does not. So
// the running sums are those of x over its largest element so far. Divide x by it, and return what
// the sums so far are multiplied by. A NaN is skipped: the products show it.
template <int N>
static __device__ __forceinline__ Real rescale(Real (&x)[N], Real &scale)
{
    Real most = scale;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (absolute(x[i]) > most) most = absolute(x[i]);
    const Real keep = most > scale ? scale / most : 1;
    scale = most;
    const Real inverse = scale > 0 ? 1 / scale : 1;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= inverse;
    return keep;
}

template <int C, int E, int R>
static __device__ __forceinline__ void add_products(
    const Tile<C, E, R> &tile, const Real (&x)[K2 * R], Real (&sums)[K][C])
{
#pragma unroll
    for (int c = 0; c < C / E; ++c)
#pragma unroll
        for (int e = 0; e < E; ++e)
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const Real w = real(tile.at[r][c].at[e]);
#pragma unroll
                for (int k = 0; k < K; ++k) sums[k][c * E + e] += x[k * R + r] * w;
            }
}

template <int E>
static __device__ __forceinline__ void store_sums(Real *to, const Real *sums, Real factor)
{
    if (E % REALS == 0) {  // n is a multiple of E here, and so every row of sums is aligned
#pragma unroll
        for (int e = 0; e + REALS <= E; e += REALS) {
            Pack<Real, REALS> some;
#pragma unroll
            for (int i = 0; i < REALS; ++i) some.at[i] = sums[e + i] * factor;
            *reinterpret_cast<Pack<Real, REALS> *>(to + e) = some;
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < E; ++e) to[e] = sums[e] * factor;
}

// Add up the sums of the groups of a block, and return the scale that they are relative to.
template <int C, int E>
static __device__ __forceinline__ Real join_groups(
    const Part &part, Real (&sums)[K][C], Real scale, Real *partial)
{
    const int thread = threadIdx.x, width = part.width, groups = THREADS / width;
    if (thread % width == 0) shared.scales[thread / width] = scale;
    __syncthreads();
    Real most = 0;
    for (int g = 0; g < groups; ++g)
        if (shared.scales[g] > most) most = shared.scales[g];
    const Real factor = scale > 0 ? scale / most : 1;
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int c = 0; c < C / E; ++c) {
            const int j = (c * width + part.member) * E;
            Real *to = partial + static_cast<Int>(k) * part.n + j;
            if (groups == 1) {
                if (j < part.n) store_sums<E>(to, sums[k] + c * E, factor);
                continue;
            }
#pragma unroll
            for (int e = 0; e < E; ++e) shared.sums[e][thread] = sums[k][c * E + e] * factor;
            __syncthreads();
            if (thread < width && j < part.n) {
                Real all[E];
#pragma unroll
                for (int e = 0; e < E; ++e) {
                    all[e] = 0;
                    for (int g = 0; g < groups; ++g) all[e] += shared.sums[e][g * width + thread];
                }
                store_sums<E>(to, all, 1);
            }
            __syncthreads();
        }
    }
    return most;
}

// Read rows whose sums fit the registers. Return the lane's share of |x|^2, and the scale of the sums.
template <int C, int E>
static __device__ __forceinline__ Real read_rows(
    const Part &part, bool again, Real *partial, Real &scale)
{
    constexpr int R = Rows<C, E>::at_once;
    const int warps = part.width / WARP, group = threadIdx.x / part.width;
    Real sums[K][C] = {}, square = 0, mine[C];
    if (K == 1 && !again) {
#pragma unroll
        for (int c = 0; c < C / E; ++c) load_v<E>(part, 0, (c * part.width + part.member) * E, mine + c * E);
    }
    int turn = 0;
#pragma unroll 1
    for (int top = group * R; top < part.height; top += THREADS / part.width * R, turn ^= 1) {
        Tile<C, E, R> tile;
        Real x[K2 * R] = {};
        tile.load(part, top, 0);
        if (again) {
            load<R>(part, top, x);
        } else {
            multiply<C, E, R>(part, tile, K == 1 ? mine : nullptr, 0, x);
            square += store<R>(part, top, sum_over_group(x, turn, warps));
        }
        const Real keep = rescale(x, scale);
        if (keep != 1) {
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
                for (int c = 0; c < C; ++c) sums[k][c] *= keep;
        }
        add_products<C, E, R>(tile, x, sums);
    }
    scale = join_groups<C, E>(part, sums, scale, partial);
    return square;
}

// Read rows of any length, all threads the same ones. A tile is small enough to be in a cache when it
// is read again; the running sums are in memory.
template <int C, int E>
static __device__ __forceinline__ Real read_long_rows(
    const Part &part, bool again, Real *partial, Real &scale)
{
    constexpr int R = Rows<C, E>::at_once;
    Real square = 0;
    int turn = 0;
#pragma unroll 1
    for (int top = 0; top < part.height; top += R, turn ^= 1) {
        Real x[K2 * R] = {};
        if (again) {
            load<R>(part, top, x);
        } else {
#pragma unroll 1
            for (int base = 0; base < part.n; base += THREADS * C) {
                Tile<C, E, R> tile;
                tile.load(part, top, base);
                multiply<C, E, R>(part, tile, nullptr, base, x);
            }
            square += store<R>(part, top, sum_over_group(x, turn, WARPS));
        }
        const Real keep = top == 0 ? 0 : 1, more = rescale(x, scale);
#pragma unroll 1
        for (int base = 0; base < part.n; base += THREADS * C) {
            Tile<C, E, R> tile;
            Real sums[K][C] = {};
            tile.load(part, top, base);
            add_products<C, E, R>(tile, x, sums);
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const int j = base + (c / E * THREADS + part.member) * E + c % E;
                    Real *to = partial + static_cast<Int>(k) * part.n + j;
                    if (j < part.n) *to = (keep > 0 ? *to * more : 0) + sums[k][c];
                }
        }
    }
    return square;
}

static __device__ __forceinline__ int end_of(int first, Int rows, const Matrix &M)
{
    return first + rows < M.rows ? first + rows : M.rows;
}

// Return whether a matrix of several vectors is to be read a second time.
static __device__ __forceinline__ bool unwanted(const Matrix &M, const Real *scratch, Int flags)
{
    return K > 1 && flags & AGAIN && scratch[M.of_x] == 0;
}

// Do the work of a block, with C columns a thread, or any number of them with C = 0. Not inlined: of
// all these instances in one function, the compiler would keep more in registers than there are.
template <int C, int E> static __device__ __noinline__ void read(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    const Row &job = jobs[M.job];
    const int block = blockIdx.x - M.row_block, n = M.columns, width = M.warps * WARP;
    const int first = block * M.block_rows, end = end_of(first, M.block_rows, M);
    const Weight *W = reinterpret_cast<const Weight *>(job.weight) + (M.entry * M.rows + first) * n;
    const Real *v = K > 1 ? scratch + M.start : old_rows(job, M, came, out, flags);
    const Part part = {M, W, v, flags & FIRST ? FRESH_SCALE : 0, scratch + M.x + first,
                       end - first, n, static_cast<int>(threadIdx.x) % width, width,
                       M.window == 1 && n % REALS == 0 && aligned(v, 16)};
    Real *partial = scratch + M.partial + static_cast<Int>(block) * K * n, scale = 0;
    const bool again = K > 1 && flags & AGAIN;
    const Real square = block_sum(C > 0 ? read_rows<C ? C : LEAST, E>(part, again, partial, scale)
                                        : read_long_rows<WEIGHTS, E>(part, again, partial, scale));
    if (threadIdx.x == 0) {
        if (!again) scratch[M.x_squares + block] = square;
        scratch[M.x_scales + block] = scale;
    }
}

#define READ(C, E) read<C, E>(jobs, matrices, work, came, out, scratch, flags)

extern "C" __global__ void __launch_bounds__(THREADS, ROWS_BLOCKS) spectral_rows(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    if (unwanted(M, scratch, flags)) return;
    const Int first = M.entry * M.rows * M.columns * sizeof(Weight) + jobs[M.job].weight;
    const bool packs = (first | M.columns * sizeof(Weight)) % sizeof(Pack<Weight, WEIGHTS>) == 0;
    if (packs && M.span == LEAST) return READ(LEAST, WEIGHTS);
    if (packs && M.span == WIDER) return READ(WIDER, WEIGHTS);
    if (packs && M.span == WIDEST) return READ(WIDEST, WEIGHTS);
    if (packs) return READ(0, WEIGHTS);
    if (M.span == LEAST) return READ(LEAST, 1);
    return READ(0, 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) spectral_columns(PARAMETERS)
{
    __shared__ Real sums[WARPS][WARP];
    const Matrix &M = matrices[work[blockIdx.x]];
    if (unwanted(M, scratch, flags)) return;
    const int block = blockIdx.x - M.column_block, n = M.columns, blocks = M.row_blocks;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, j = block * WARP + lane;
    const Real *scales = scratch + M.x_scales;
    // The second reading is with unit rows.
    const Real inverse = flags & AGAIN ? 1 : inverse_length(total(scratch + M.x_squares, blocks));
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
        const Real *partial = scratch + M.partial + static_cast<Int>(k) * n;
        Real sum = 0;
        if (j < n) {
#pragma unroll 8
            for (int b = warp; b < blocks; b += WARPS)
                sum += partial[static_cast<Int>(b) * K * n + j] * (scales[b] * inverse);
        }
        sums[warp][lane] = sum;
        __syncthreads();
        if (warp == 0) {
            Real y = 0;
            for (int w = 0; w < WARPS; ++w) y += sums[w][lane];
            if (j < n) scratch[M.y + static_cast<Int>(k) * n + j] = y;
            if (K == 1) {
                const Real square = warp_sum(j < n ? y * y : 0);
                if (lane == 0) scratch[M.y_squares + block] = square;
            }
        }
        if (K > 1) __syncthreads();
    }
    if (K == 1 && block == 0 && threadIdx.x == 0) scratch[M.of_x] = inverse;
}

#if SPECTRAL_VECTORS > 1

// The rounding errors of Z = L^-1 (X W) are at most those of Q W times this number. Otherwise W is
// read again.
#define AMPLIFIED 16.0

constexpr int PAIRS = K * (K + 1) / 2;
constexpr int SUMS = PAIRS > 2 * K ? PAIRS : 2 * K;

// Sums of a block, and the k x k matrices of `finish`.
__shared__ double of_warps[WARPS][SUMS], found[SUMS];
__shared__ double gram_matrix[K][K], H[K][K], T[K][K];
__shared__ bool accurate;

// Store the sums over the block in `found`.
template <int N> static __device__ __forceinline__ void block_sums(double (&x)[N])
{
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = warp_sum(x[i]);
        if (thread % WARP == 0) of_warps[thread / WARP][i] = x[i];
    }
    __syncthreads();
    if (thread < N) {
        double sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += of_warps[warp][thread];
        found[thread] = sum;
    }
    __syncthreads();
}

// Store the inner products of k rows in `gram_matrix`, times a factor.
static __device__ void find_gram_matrix(const Real *rows, int length, double factor)
{
    double sums[PAIRS] = {};
    for (int i = threadIdx.x; i < length; i += THREADS) {
        double x[K];
#pragma unroll
        for (int a = 0; a < K; ++a) x[a] = rows[static_cast<Int>(a) * length + i];
#pragma unroll
        for (int a = 0; a < K; ++a)
#pragma unroll
            for (int b = 0; b <= a; ++b) sums[a * (a + 1) / 2 + b] += x[a] * x[b];
    }
    block_sums(sums);
    const int a = threadIdx.x / K, b = threadIdx.x % K;
    if (a < K) {
        const int most = a > b ? a : b, least = a > b ? b : a;
        gram_matrix[a][b] = found[most * (most + 1) / 2 + least] * factor;
    }
    __syncthreads();
}

// Factorize the Gram matrix = L L^T and store L^-1 in T; return whether that is accurate. A row of T
// is zero where the row adds no direction.
static __device__ bool factorize()
{
    double L[K][K], sum = 0;
    bool good = true;
    for (int a = 0; a < K; ++a) sum += gram_matrix[a][a];
    if (!(sum > 0 && sum - sum == 0)) {  // zero, or not finite
        for (int a = 0; a < K * K; ++a) T[a / K][a % K] = sum == 0 ? 0 : sum - sum;
        return true;
    }
    const double eps = SPECTRAL_EPS;
    for (int a = 0; a < K; ++a) {
        double left = gram_matrix[a][a];
        for (int b = 0; b < K; ++b) T[a][b] = 0;
        for (int b = 0; b < a; ++b) {
            double entry = gram_matrix[a][b];
            for (int c = 0; c < b; ++c) entry -= L[a][c] * L[b][c];
            L[a][b] = entry * T[b][b];
            left -= L[a][b] * L[a][b];
        }
        // Relative to all rows together, as the core's `left_rows`.
        const bool adds = a == 0 ? left > 0 : left > eps * eps * sum;
        // In float64 the difference says nothing about rows that are nearly dependent. For float32
        // it says enough: eps^2 is well above the rounding errors of float64.
        if (left * (AMPLIFIED * AMPLIFIED) < gram_matrix[a][a] && (adds || eps < 1e-12)) good = false;
        if (!adds) continue;
        T[a][a] = 1 / sqrt(left);
        double amplified = sqrt(gram_matrix[a][a]) * T[a][a];
        for (int b = 0; b < a; ++b) {
            double entry = 0;
            for (int c = b; c < a; ++c) entry -= L[a][c] * T[c][b];
            T[a][b] = entry * T[a][a];
            amplified += (T[a][b] < 0 ? -T[a][b] : T[a][b]) * sqrt(gram_matrix[b][b]);
        }
        good = good && amplified <= AMPLIFIED;
    }
    return good;
}

// Subtract from row a its parts along the unit rows before it.
static __device__ void subtract_earlier(Real *rows, int length, int a)
{
    double dots[K] = {};
    for (int i = threadIdx.x; i < length; i += THREADS)
        for (int b = 0; b < a; ++b)
            dots[b] += static_cast<double>(rows[static_cast<Int>(b) * length + i]) * rows[static_cast<Int>(a) * length + i];
    block_sums(dots);
    for (int i = threadIdx.x; i < length; i += THREADS) {
        Real left = rows[static_cast<Int>(a) * length + i];
        for (int b = 0; b < a; ++b)
            left -= static_cast<Real>(found[b]) * rows[static_cast<Int>(b) * length + i];
        rows[static_cast<Int>(a) * length + i] = left;
    }
}

static __device__ void multiply_row(Real *row, int length, Real factor)
{
    for (int i = threadIdx.x; i < length; i += THREADS) row[i] *= factor;
}

// Orthonormalize rows as the core's `left_rows`: each twice. One that adds no direction becomes zero.
static __device__ void gram_schmidt(Real *rows, int length, Real scale)
{
    for (int a = 0; a < K; ++a) {
        Real *row = rows + static_cast<Int>(a) * length;
        multiply_row(row, length, scale);
        for (int turn = 0; a > 0 && turn < 2; ++turn) subtract_earlier(rows, length, a);
        double square[1] = {};
        for (int i = threadIdx.x; i < length; i += THREADS)
            square[0] += static_cast<double>(row[i]) * row[i];
        block_sums(square);
        const Real length_of_row = static_cast<Real>(sqrt(found[0]));
        const bool adds = a == 0 || length_of_row > static_cast<Real>(SPECTRAL_EPS);
        multiply_row(row, length, adds ? inverse_length(static_cast<Real>(found[0])) : 0);
    }
}

// Rotate two rows of X, or columns: element `lane` of each.
static __device__ __forceinline__ void rotate(double &x, double &y, double c, double s)
{
    const double before = x;
    x = c * before + s * y;
    y = c * y - s * before;
}

// Store T G T^T in H and make it diagonal by one Jacobi sweep, the largest element first. T rotates
// with it. See the core's `_rotation`. One warp calls this, a lane for each column.
static __device__ void sort_by_rotations()
{
    const int lane = threadIdx.x % WARP;
    if (lane < K)
        for (int a = 0; a < K; ++a) {
            double sum = 0;
            for (int b = 0; b < K; ++b) sum += T[a][b] * gram_matrix[b][lane];
            H[a][lane] = sum;
        }
    __syncwarp();
    double row[K];
    if (lane < K) {
        for (int a = 0; a < K; ++a) {  // row `lane` of H T^T
            row[a] = 0;
            for (int b = 0; b < K; ++b) row[a] += H[lane][b] * T[a][b];
        }
        for (int a = 0; a < K; ++a) H[lane][a] = row[a];
    }
    __syncwarp();
    for (int i = 0; i < K; ++i)
        for (int j = i + 1; j < K; ++j) {
            const double p = H[i][i], q = H[j][j], size = p + q + 1e-300;
            const double d = (p - q) / size, b = 2 * H[i][j] / size;
            const double w = sqrt(d * d + b * b) + (d < 0 ? -d : d) + 1e-150;
            const double inverse = 1 / sqrt(w * w + b * b);
            const double c = (d >= 0 ? w : b) * inverse, s = (d >= 0 ? b : w) * inverse;
            __syncwarp();
            if (lane < K) {
                rotate(H[i][lane], H[j][lane], c, s);
                rotate(T[i][lane], T[j][lane], c, s);
            }
            __syncwarp();
            if (lane < K) rotate(H[lane][i], H[lane][j], c, s);
            __syncwarp();
        }
}

// The rows of a matrix that `renew` works on.
struct Rows_of_V {
    const Matrix &M;
    const Real *old;  // as they came
    Real *z;          // k rows of n, in the order of memory: X W, then the new V
    int n;

    __device__ __forceinline__ Real &at(int a, int j) const { return z[static_cast<Int>(a) * n + j]; }
    __device__ __forceinline__ Real before(int a, int place) const
    {
        return old[static_cast<Int>(a) * n + place];
    }
};

constexpr int CANDIDATES = K == 2 ? 2 : K - 1;  // rows of Z that go on; from k = 3 on the last is old

// Make the sorted rows of Z over sigma, each with a little of the old ones, and find their parts
// along the first.
static __device__ void find_candidates(const Rows_of_V &V, Real inverse)
{
    double dots[K] = {};
    for (int j = threadIdx.x; j < V.n; j += THREADS) {
        Real z[K], s[K];
        const int place = in_v(V.M, j);
        const Real v = V.before(0, place);
#pragma unroll
        for (int a = 0; a < K; ++a) z[a] = V.at(a, j);
#pragma unroll
        for (int a = 0; a < CANDIDATES; ++a) {
            double sum = 0;
#pragma unroll
            for (int b = 0; b < K; ++b) sum += T[a][b] * z[b];
            s[a] = static_cast<Real>(sum * inverse);
            if (a > 0)
                s[a] += static_cast<Real>(SPECTRAL_EPS) * (V.before(a, place) + static_cast<Real>(0.5) * v);
            dots[a] += static_cast<double>(s[a]) * s[0];
            V.at(a, j) = s[a];
        }
        if (K > 2) V.at(K - 1, j) = v;
    }
    block_sums(dots);
}

// Subtract from the rows from `first` to `end` their parts along the rows before `first`, as they are
// in `found`. Find the parts that rounding has left, and the squares of what is left.
template <int FIRST_ROW, int END> static __device__ void subtract_found(const Rows_of_V &V)
{
    constexpr int COUNT = (END - FIRST_ROW) * FIRST_ROW;
    double parts[COUNT], sums[COUNT + END - FIRST_ROW] = {};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) parts[i] = found[i];
    __syncthreads();
    for (int j = threadIdx.x; j < V.n; j += THREADS) {
#pragma unroll
        for (int a = FIRST_ROW; a < END; ++a) {
            Real left = V.at(a, j);
#pragma unroll
            for (int b = 0; b < FIRST_ROW; ++b)
                left -= static_cast<Real>(parts[(a - FIRST_ROW) * FIRST_ROW + b]) * V.at(b, j);
#pragma unroll
            for (int b = 0; b < FIRST_ROW; ++b)
                sums[(a - FIRST_ROW) * FIRST_ROW + b] += static_cast<double>(left) * V.at(b, j);
            sums[COUNT + a - FIRST_ROW] += static_cast<double>(left) * left;
            V.at(a, j) = left;
        }
    }
    block_sums(sums);
}

// Make unit rows, orthogonal to the rows before `first`, of rows whose parts along these are in
// `found`: zero where a row is in their span. See `_orthogonal_unit` of the core.
template <int FIRST_ROW, int END> static __device__ void make_orthogonal(const Rows_of_V &V)
{
    constexpr int COUNT = (END - FIRST_ROW) * FIRST_ROW;
    double once[END - FIRST_ROW];
    subtract_found<FIRST_ROW, END>(V);
#pragma unroll
    for (int a = FIRST_ROW; a < END; ++a) once[a - FIRST_ROW] = found[COUNT + a - FIRST_ROW];
    subtract_found<FIRST_ROW, END>(V);
#pragma unroll
    for (int a = FIRST_ROW; a < END; ++a) {
        const Real square = static_cast<Real>(found[COUNT + a - FIRST_ROW]);
        const bool is_new = sqrt(square) > static_cast<Real>(0.5 * sqrt(once[a - FIRST_ROW]));
        multiply_row(V.z + static_cast<Int>(a) * V.n, V.n, is_new ? inverse_length(square) : 0);
    }
    __syncthreads();  // `found` may be written again
}

// Make the next V of the rows of Z: see `_next` of the core.
static __device__ void renew(const Rows_of_V &V, Real inverse)
{
    find_candidates(V, inverse);
    double parts[K] = {};  // those of row a along the first are found at a - 1
#pragma unroll
    for (int a = 1; a < CANDIDATES; ++a) parts[a] = found[a];
    __syncthreads();
    if (threadIdx.x == 0)
        for (int a = 1; a < CANDIDATES; ++a) found[a - 1] = parts[a];
    __syncthreads();
    make_orthogonal<1, CANDIDATES>(V);
    if (K == 2) return;
    double dots[K] = {};
    for (int j = threadIdx.x; j < V.n; j += THREADS)
#pragma unroll
        for (int a = 0; a < K - 1; ++a) dots[a] += static_cast<double>(V.at(K - 1, j)) * V.at(a, j);
    block_sums(dots);
    make_orthogonal<K - 1, K>(V);
}

// Find T so that T X / |X| has orthonormal rows, or orthonormalize X itself.
static __device__ bool orthonormalize(const Matrix &M, Real *scratch, Real scale)
{
    Real *x = scratch + M.x;
    find_gram_matrix(x, M.rows, static_cast<double>(scale) * scale);
    if (threadIdx.x == 0) {
        accurate = factorize();
        scratch[M.of_x] = accurate ? 0 : 1;
    }
    __syncthreads();
    if (!accurate) gram_schmidt(x, M.rows, scale);
    return accurate;
}

// Finish an iteration of several vectors. With X = L Q and a lower triangular L, Q W is L^-1 (X W):
// so `rows` needs no orthonormal rows, and reads W once. L follows from the inner products of X, and
// the rotations that sort Q W from those of X W: k x k matrices in float64, since inner products
// square the range of numbers. T is the product of all these transformations. Rows that are nearly
// dependent, as where the rank of W is below k, would be too inaccurate: X is then orthonormalized,
// and W read again. Algorithm and names are those of block_kernels.py in spectral_core.
extern "C" __global__ void __launch_bounds__(THREADS, 1) spectral_finish(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    if (unwanted(M, scratch, flags)) return;
    const Row &job = jobs[M.job];
    const int m = M.rows, n = M.columns, thread = threadIdx.x;
    Real scale = 1;
    if (flags & AGAIN) {
        if (thread < K * K) T[thread / K][thread % K] = thread / K == thread % K;
    } else {
        scale = inverse_length(total(scratch + M.x_squares, M.row_blocks));
        if (!orthonormalize(M, scratch, scale)) return;
    }
    const Rows_of_V V = {M, old_rows(job, M, came, out, flags), scratch + M.y, n};
    find_gram_matrix(V.z, n, 1);
    if (thread < WARP) sort_by_rotations();
    __syncthreads();
    const Real *x = scratch + M.x;
    for (int i = thread; i < m; i += THREADS) {
        double u = 0;
#pragma unroll
        for (int a = 0; a < K; ++a) u += T[0][a] * (x[static_cast<Int>(a) * m + i] * scale);
        out[M.out_u + i] = static_cast<Real>(u);
    }
    const Real square = static_cast<Real>(H[0][0] < 0 ? 0 : H[0][0]), inverse = inverse_length(square);
    if (thread == 0) scratch[M.y_squares] = sqrt(square);
    if (inverse > 0) renew(V, inverse);
    for (int a = 0; a < K; ++a)
        for (int j = thread; j < n; j += THREADS) {
            const int place = in_v(M, j);
            const Real v = inverse > 0 ? V.at(a, j) : V.before(a, place);
            out[M.out_v + static_cast<Int>(a) * n + place] = v;
            scratch[M.start + static_cast<Int>(a) * n + j] = v;
        }
}

// Store V plus the fresh direction, from which a step starts, in the order of memory.
extern "C" __global__ void __launch_bounds__(THREADS, 2) spectral_start(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    const Real *v = old_rows(jobs[M.job], M, came, out, flags);
    const int j = (blockIdx.x - M.column_block) * WARP + threadIdx.x % WARP, a = threadIdx.x / WARP;
    const int place = in_v(M, j);
    if (j < M.columns && a < K)
        scratch[M.start + a * M.columns + j] = v[a * M.columns + place] + FRESH_SCALE * fresh(place);
}

#endif

// The factors of `apply`: u = x * of_x, v = y * of_y.
struct Term {
    const Real *x, *y;
    Real of_x, of_y, sigma;
    bool permuted;  // y has the order of v, and not that of memory
};

static __device__ __forceinline__ Term last_term(const Row &job, const Matrix &M, const char *came)
{
    return {came_vector(came, job.u, M.entry * M.rows),
            came_vector(came, job.v, M.entry * K * M.columns), 1, 1,
            *came_vector(came, job.sigma, M.entry), M.window > 1};
}

static __device__ __forceinline__ Term iterated_term(
    const Row &job, const Matrix &M, const char *came, const Real *out, const Real *scratch,
    Int flags)
{
    if (K > 1)  // by `finish`
        return {out + M.out_u, out + M.out_v, 1, 1, scratch[M.y_squares], M.window > 1};
    const Real of_x = scratch[M.of_x], square = total(scratch + M.y_squares, M.column_blocks);
    const Real of_y = inverse_length(square);
    if (of_y > 0) return {scratch + M.x, scratch + M.y, of_x, of_y, sqrt(square), false};
    // v stays. If this kernel writes it to where it is, it writes the same numbers.
    const Real *v = old_rows(job, M, came, out, flags);
    return {scratch + M.x, v, of_x, 1, sqrt(square), M.window > 1};
}

static __device__ __forceinline__ Real number(Int size, Int bits)
{
    if (size == 4) return static_cast<Real>(*reinterpret_cast<const float *>(bits));
    if (size == 8) return static_cast<Real>(*reinterpret_cast<const double *>(bits));
    return static_cast<Real>(__longlong_as_double(bits));  // a Python float
}

// The derivative of the penalty by sigma. A comparison with NaN is false: a NaN stays NaN.
static __device__ __forceinline__ Real slope(const Row &job, Real sigma)
{
    if (job.code == 0) return sigma;
    if (job.code >= AT_MOST) return 0;
    const Real target = number(job.target_size, job.target);
    if (sigma <= target) return 0;
    return job.code == 1 ? 1 : sigma - target;
}

// The number that scales a weight to its bound, as `scale_to` of the core: one where it does not act.
static __device__ __forceinline__ Real scale_to_bound(const Row &job, Real sigma)
{
    if (job.code < AT_MOST) return 1;
    const Real target = number(job.target_size, job.target);
    const bool finite = sigma - sigma == 0;
    return finite && sigma > (job.code == EXACTLY ? 0 : target) ? target / sigma : 1;
}

// What `change` does to each gradient of a block: it adds weight u v^T, or multiplies by a scale.
struct Change {
    const Matrix &M;
    Term term;
    Real weight, scale;
    Grad *G;  // of the matrix
    int first, end;
};

// Packs meet packs of y, in the order of memory; a single element may be anywhere in y.
template <int E>
static __device__ __forceinline__ Pack<Grad, E> added(
    const Change &change, Pack<Grad, E> g, int row, int j)
{
    const Term &term = change.term;
    const Sum u = wide(term.x[row] * term.of_x * change.weight);
    Pack<Real, E> y;
    if (E > 1)
        y = *reinterpret_cast<const Pack<Real, E> *>(term.y + j);
    else
        y.at[0] = term.y[term.permuted ? in_v(change.M, j) : j];
#pragma unroll
    for (int e = 0; e < E; ++e)
        g.at[e] = static_cast<Grad>(wide(g.at[e]) + u * wide(y.at[e] * term.of_y));
    return g;
}

template <int E>
static __device__ __forceinline__ Pack<Grad, E> scaled(Pack<Grad, E> g, Real scale)
{
#pragma unroll
    for (int e = 0; e < E; ++e) g.at[e] = static_cast<Grad>(wide(g.at[e]) * scale);
    return g;
}

// Where a thread is in a block of whole rows. The block is one piece of memory, and the threads share
// it without regard to where rows end, so none idles. The next load is THREADS loads further on.
struct Place {
    int row, load;

    __device__ __forceinline__ void advance(int loads)
    {
        row += THREADS / loads;
        load += THREADS % loads;
        if (load >= loads) load -= loads, ++row;
    }
};

template <int E, bool SCALED> static __device__ __forceinline__ void change_rows(const Change &change)
{
    typedef Pack<Grad, E> Grads;
    const int loads = static_cast<int>(change.M.columns) / E, thread = threadIdx.x;  // of a row
    Grads *G = reinterpret_cast<Grads *>(change.G);
    Place place = {change.first + thread / loads, thread % loads};
    while (place.row < change.end) {
        Grads g[BATCH];
        Place next = place;
#pragma unroll
        for (int i = 0; i < BATCH; ++i, next.advance(loads))
            if (next.row < change.end) g[i] = G[static_cast<Int>(next.row) * loads + next.load];
#pragma unroll
        for (int i = 0; i < BATCH; ++i, place.advance(loads)) {
            if (place.row >= change.end) break;
            G[static_cast<Int>(place.row) * loads + place.load] =
                SCALED ? scaled(g[i], change.scale) : added(change, g[i], place.row, place.load * E);
        }
    }
}

template <int E> static __device__ __forceinline__ void change_by(const Change &change, bool scales)
{
    if (scales)
        change_rows<E, true>(change);
    else
        change_rows<E, false>(change);
}

extern "C" __global__ void __launch_bounds__(THREADS, APPLY_BLOCKS) spectral_apply(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    const Row &job = jobs[M.job];
    const int thread = threadIdx.x, block = blockIdx.x - M.apply_block, n = M.columns;
    const int first = block * M.apply_rows, end = end_of(first, M.apply_rows, M);
    const Term term = flags & ITERATED ? iterated_term(job, M, came, out, scratch, flags)
                                    : last_term(job, M, came);
    // The last iteration alone changes the gradient or the weight, and so sigma.
    const Real scale = flags & ADD ? scale_to_bound(job, term.sigma) : 1;
    if (flags & ITERATED && block == 0 && thread == 0) out[M.out_sigma] = term.sigma * scale;
    if (K == 1 && flags & ITERATED) {
        for (int i = first + thread; i < end; i += THREADS) out[M.out_u + i] = term.x[i] * term.of_x;
        if (block == 0)
            for (int j = thread; j < n; j += THREADS) {
                const int place = in_v(M, j);
                out[M.out_v + place] = term.y[term.permuted ? place : j] * term.of_y;
            }
    }
    const bool scales = scale != 1, adds = flags & ADD && job.grad && job.code < AT_MOST;
    if (!scales && !adds) return;
    Grad *G = reinterpret_cast<Grad *>(job.grad) + M.entry * M.rows * n;
    const Real weight = number(job.factor_size, job.factor) * slope(job, term.sigma);
    const Change change = {M, term, weight, scale, G, first, end};
    if (n % GRADS == 0 && aligned(G, 16) && !term.permuted && aligned(term.y, GRADS * sizeof(Real)))
        change_by<GRADS>(change, scales);
    else
        change_by<1>(change, scales);
}
