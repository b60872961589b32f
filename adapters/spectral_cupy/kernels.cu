// Algorithm 1, lines 7-9, of many matrices in three kernels.
//
// rows     reads each weight once: a block works on some rows W_b of one matrix, x_b = W_b v, and
//          while W_b is in the caches, p_b = W_b^T x_b.
// columns  y = W^T u = (sum of p_b) / |x|, for 32 columns a block.
// apply    u = x / |x|, sigma = |y|, v = y / |y|, G += factor slope(sigma) u v^T.
//
// Tables made by the host (_engine.py) say which block works on what. A sum has the same order in
// every run: there are no atomics. The host defines the types before this text:
//
// SPECTRAL_WEIGHT, SPECTRAL_GRAD  as they are stored
// SPECTRAL_REAL                   of the iteration: float, or double for double weights
// SPECTRAL_SUM                    in which a gradient's sum is computed, then rounded once
// SPECTRAL_TINY                   the smallest normal number of SPECTRAL_REAL
// SPECTRAL_HALF                   if one of them is half
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
#define BLOCKS 2  // on a multiprocessor at once: while one waits, the other reads
#define WARP 32
#define WARPS (THREADS / WARP)
#define MAX_TILE 256  // rows
#define BATCH 4       // loads of a gradient that are issued before the first is used

// The largest element of the core's `fresh_direction`, 2^-20 or in float64 2^-27, over 2^31.
#define FRESH_SCALE static_cast<Real>(sizeof(Real) == 4 ? 4.440892098500626e-16 : 3.469446951953614e-18)

// Codes of a bound in a row of the table of jobs.
#define AT_MOST 3
#define EXACTLY 4

// Flags of a launch.
#define FIRST 1  // v is the caller's; later iterations read that of the iteration before
#define ITERATED 2  // there was an iteration: (sigma, u, v) come from the scratch and go to the results
#define ADD 4    // change the gradients

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
    Int block_rows, tile_rows, width;  // width: threads that share a row, a power of two
    Int row_block, row_blocks;         // the first of its blocks in `rows` and `apply`, their number
    Int column_block, column_blocks;   // the same in `columns`
    Int x, y, partial;
    Int x_squares, x_scales, y_squares;
    Int out_u, out_v, out_sigma;
};

#define PARAMETERS                                                                          \
    const Row *__restrict__ jobs, const Matrix *__restrict__ matrices,                      \
        const Int *__restrict__ work, const char *came, Real *out, Real *scratch, Int flags

// Of the longest loop: doubles need twice the registers. No macro, which #pragma does not expand.
constexpr int UNROLL = 32 / sizeof(Real);

static __device__ __forceinline__ Real real(float x) { return static_cast<Real>(x); }
static __device__ __forceinline__ double real(double x) { return x; }
static __device__ __forceinline__ Sum wide(float x) { return static_cast<Sum>(x); }
static __device__ __forceinline__ double wide(double x) { return x; }
#ifdef SPECTRAL_HALF
static __device__ __forceinline__ Real real(__half x) { return real(__half2float(x)); }
static __device__ __forceinline__ Sum wide(__half x) { return wide(__half2float(x)); }
#endif

static __device__ __forceinline__ Real absolute(Real x) { return x < 0 ? -x : x; }

// Return the sum over `lanes` neighbours, a power of two. All threads of a warp call it.
static __device__ __forceinline__ Real lanes_sum(Real value, int lanes)
{
    for (int other = lanes / 2; other > 0; other /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, other);
    return value;
}

// Return the sum over the block in each thread of it.
static __device__ __forceinline__ Real block_sum(Real value)
{
    __shared__ Real of_warp[WARPS];
    value = lanes_sum(value, WARP);
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

// Return an element of the core's `fresh_direction` over `scale`: computed, so nothing is read.
static __device__ __forceinline__ Real fresh(int j)
{
    const unsigned place = static_cast<unsigned>(j) + 1u;
    return static_cast<Real>(static_cast<int>(place * place * 0x9E3779B1u));
}

// Compute x = W v of some rows: `width` threads share a row, and so read along it. v is that in
// memory plus `scale` times the fresh direction; `scale` is zero after the first iteration.
static __device__ __forceinline__ void products(
    const Weight *__restrict__ W, const Real *__restrict__ v, Real scale, int height, int n,
    int width, Real *x)
{
    __shared__ Real parts[MAX_TILE];  // of the warps that share a row; height * warps fits
    const int thread = threadIdx.x, member = thread % width, groups = THREADS / width;
    const int lanes = width < WARP ? width : WARP, warps = width / lanes;
#pragma unroll 1
    for (int top = 0; top < height; top += groups) {  // as often in every thread: they shuffle
        const int row = top + thread / width;
        Real sum = 0;
        if (row < height) {
            const Weight *along = W + static_cast<Int>(row) * n;
#pragma unroll UNROLL
            for (int j = member; j < n; j += width)
                sum += real(along[j]) * (v[j] + scale * fresh(j));
        }
        sum = lanes_sum(sum, lanes);
        if (row < height && member % lanes == 0) parts[row * warps + member / lanes] = sum;
    }
    __syncthreads();
    if (thread < height) {
        Real sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += parts[thread * warps + warp];
        x[thread] = sum;
    }
    __syncthreads();
}

// Return the largest |x|, or `before` if that is larger. A NaN is skipped: the products show it.
static __device__ __forceinline__ Real largest(const Real *x, int height, Real before)
{
    __shared__ Real found;
    if (threadIdx.x < WARP) {
        Real most = before;
        for (int i = threadIdx.x; i < height; i += WARP)
            if (absolute(x[i]) > most) most = absolute(x[i]);
        for (int other = WARP / 2; other > 0; other /= 2) {
            const Real theirs = __shfl_xor_sync(0xffffffffu, most, other);
            if (theirs > most) most = theirs;
        }
        if (threadIdx.x == 0) found = most;
    }
    __syncthreads();
    return found;
}

static __device__ __forceinline__ int end_of(int first, const Matrix &M)
{
    return first + M.block_rows < M.rows ? first + M.block_rows : M.rows;
}

// A tile of rows is small enough to be in a cache when it is read again. W^T x has the size of sigma
// squared, which can leave the range of float32 where sigma does not. So the partial sums are those
// of x over its largest element so far.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) spectral_rows(PARAMETERS)
{
    __shared__ Real x[MAX_TILE];
    const Matrix &M = matrices[work[blockIdx.x]];
    const Row &job = jobs[M.job];
    const int thread = threadIdx.x, block = blockIdx.x - M.row_block, n = M.columns;
    const int first = block * M.block_rows, end = end_of(first, M);
    const Weight *W = reinterpret_cast<const Weight *>(job.weight) + (M.entry * M.rows + first) * n;
    const Real *v = flags & FIRST ? came_vector(came, job.v, M.entry * n) : out + M.out_v;
    Real *partial = scratch + M.partial + static_cast<Int>(block) * n;
    const Real of_fresh = flags & FIRST ? FRESH_SCALE : 0;
    Real square = 0, scale = 0;
#pragma unroll 1
    for (int top = first; top < end; top += M.tile_rows, W += M.tile_rows * n) {
        const int height = end - top < M.tile_rows ? end - top : M.tile_rows;
        products(W, v, of_fresh, height, n, M.width, x);
        const Real before = scale;
        scale = largest(x, height, before);
        const Real keep = scale > 0 ? before / scale : 0;
        if (thread < height) {
            const Real mine = x[thread];
            square += mine * mine;
            scratch[M.x + top + thread] = mine;
            x[thread] = scale > 0 ? mine / scale : mine;
        }
        __syncthreads();
#pragma unroll 1
        for (int j = thread; j < n; j += THREADS) {
            Real sum = top == first ? 0 : partial[j] * keep;
            const Weight *down = W + j;
#pragma unroll 8
            for (int i = 0; i < height; ++i, down += n) sum += x[i] * real(*down);
            partial[j] = sum;
        }
        // The next tile writes x only after a barrier in `products`.
    }
    square = block_sum(square);
    if (thread == 0) {
        scratch[M.x_squares + block] = square;
        scratch[M.x_scales + block] = scale;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) spectral_columns(PARAMETERS)
{
    __shared__ Real sums[WARPS][WARP];
    const Matrix &M = matrices[work[blockIdx.x]];
    const int block = blockIdx.x - M.column_block, n = M.columns, blocks = M.row_blocks;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, j = block * WARP + lane;
    const Real *partial = scratch + M.partial, *scales = scratch + M.x_scales;
    const Real inverse = inverse_length(total(scratch + M.x_squares, blocks));
    Real sum = 0;
    if (j < n) {
#pragma unroll 8
        for (int b = warp; b < blocks; b += WARPS)
            sum += partial[static_cast<Int>(b) * n + j] * (scales[b] * inverse);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
        Real y = 0;
        for (int w = 0; w < WARPS; ++w) y += sums[w][lane];
        if (j < n) scratch[M.y + j] = y;
        const Real square = lanes_sum(j < n ? y * y : 0, WARP);
        if (lane == 0) scratch[M.y_squares + block] = square;
    }
}

// The factors of `apply`: u = x * of_x, v = y * of_y.
struct Term {
    const Real *x, *y;
    Real of_x, of_y, sigma;
};

static __device__ __forceinline__ Term last_term(const Row &job, const Matrix &M, const char *came)
{
    return {came_vector(came, job.u, M.entry * M.rows),
            came_vector(came, job.v, M.entry * M.columns), 1, 1,
            *came_vector(came, job.sigma, M.entry)};
}

static __device__ __forceinline__ Term iterated_term(
    const Row &job, const Matrix &M, const char *came, const Real *out, const Real *scratch,
    Int flags)
{
    const Real of_x = inverse_length(total(scratch + M.x_squares, M.row_blocks));
    const Real square = total(scratch + M.y_squares, M.column_blocks);
    const Real of_y = inverse_length(square);
    if (of_y > 0) return {scratch + M.x, scratch + M.y, of_x, of_y, sqrt(square)};
    // v stays. If this kernel writes it to where it is, it writes the same numbers.
    const Real *v = flags & FIRST ? came_vector(came, job.v, M.entry * M.columns) : out + M.out_v;
    return {scratch + M.x, v, of_x, 1, sqrt(square)};
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

static __device__ __forceinline__ void add_row(
    Grad *G, Real u, const Real *y, Real of_y, int n, int member, int width)
{
#pragma unroll 1
    for (int start = member; start < n; start += BATCH * width) {
        Grad g[BATCH];
        Real v[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int j = start + k * width;
            if (j < n) {
                g[k] = G[j];
                v[k] = y[j] * of_y;
            }
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int j = start + k * width;
            if (j < n) G[j] = static_cast<Grad>(wide(g[k]) + wide(u) * wide(v[k]));
        }
    }
}

// Apart from `add_row`: one formula for both would need more registers than there are.
static __device__ __forceinline__ void scale_row(Grad *W, Real scale, int n, int member, int width)
{
#pragma unroll 4
    for (int j = member; j < n; j += width) W[j] = static_cast<Grad>(wide(W[j]) * scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) spectral_apply(PARAMETERS)
{
    const Matrix &M = matrices[work[blockIdx.x]];
    const Row &job = jobs[M.job];
    const int thread = threadIdx.x, block = blockIdx.x - M.row_block, n = M.columns;
    const int first = block * M.block_rows, end = end_of(first, M);
    const int width = M.width, member = thread % width, groups = THREADS / width;
    const Term term = flags & ITERATED ? iterated_term(job, M, came, out, scratch, flags)
                                    : last_term(job, M, came);
    const Real weight = number(job.factor_size, job.factor) * slope(job, term.sigma);
    // The last iteration alone changes the gradient or the weight, and so sigma.
    const Real scale = flags & ADD ? scale_to_bound(job, term.sigma) : 1;
    const bool add = flags & ADD && job.grad && job.code < AT_MOST;
    if (flags & ITERATED && block == 0 && thread == 0) out[M.out_sigma] = term.sigma * scale;
    Grad *G = reinterpret_cast<Grad *>(job.grad) + M.entry * M.rows * n;
#pragma unroll 1
    for (int row = first + thread / width; row < end; row += groups) {
        const Real u = term.x[row] * term.of_x;
        if (flags & ITERATED && member == 0) out[M.out_u + row] = u;
        if (add)
            add_row(G + static_cast<Int>(row) * n, u * weight, term.y, term.of_y, n, member, width);
        else if (scale != 1)
            scale_row(G + static_cast<Int>(row) * n, scale, n, member, width);
    }
    if (flags & ITERATED && block == 0) {
        for (int j = thread; j < n; j += THREADS) out[M.out_v + j] = term.y[j] * term.of_y;
    }
}
