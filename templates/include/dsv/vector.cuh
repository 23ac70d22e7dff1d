// Vectors of elements in global memory, widened to f32 in registers, and arrays whose dtype is a launch parameter.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

// The widest load is 16 bytes; longer vectors are several of them.
__device__ constexpr int vector_alignment(int bytes) { return bytes < 16 ? bytes : 16; }

template <typename T, int V>
struct alignas(vector_alignment(sizeof(T) * V)) Vector {
    T lane[V];
};

template <int V, typename T>
__device__ __forceinline__ void load_vector(const T* from, float (&x)[V]) {
    const Vector<T, V> v = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = to_float(v.lane[i]);
}

template <int V, typename T>
__device__ __forceinline__ void store_vector(T* to, const float (&x)[V]) {
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.lane[i] = from_float<T>(x[i]);
    *reinterpret_cast<Vector<T, V>*>(to) = v;
}

// A contiguous array of f32 or of the kernel's element.
struct Flat {
    uint64 ptr;
    int32 is_f32;
    int32 reserved;
};
static_assert(sizeof(Flat) == 16, "mirrors dsv_spec::params::Flat");

template <typename Element, int V>
__device__ __forceinline__ void load_vector(const Flat& from, int64 first, float (&x)[V]) {
    if (from.is_f32) {
        load_vector(reinterpret_cast<const float*>(from.ptr) + first, x);
    } else {
        load_vector(reinterpret_cast<const Element*>(from.ptr) + first, x);
    }
}

template <typename Element, int V>
__device__ __forceinline__ void store_vector(const Flat& to, int64 first, const float (&x)[V]) {
    if (to.is_f32) {
        store_vector(reinterpret_cast<float*>(to.ptr) + first, x);
    } else {
        store_vector(reinterpret_cast<Element*>(to.ptr) + first, x);
    }
}

// Whether vectors of 16 bytes may start at this address.
__device__ __forceinline__ bool is_aligned(const void* ptr) { return reinterpret_cast<uint64>(ptr) % 16 == 0; }
__device__ __forceinline__ bool is_aligned(const Flat& array) { return array.ptr % 16 == 0; }

template <int V>
struct Width {
    static constexpr int value = V;
};

// Calls f(Width<V>, first) for whole vectors and f(Width<1>, i) for the rest of [0, count), spread over the grid's x
// axis. Arrays that are not `aligned` are walked element by element.
template <int V, typename F>
__device__ __forceinline__ void for_each_vector(int64 count, bool aligned, F f) {
    const int64 thread = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64 threads = static_cast<int64>(gridDim.x) * blockDim.x;
    const int64 vectors = aligned ? count / V : 0;
    for (int64 i = thread; i < vectors; i += threads) f(Width<V>{}, i * V);
    for (int64 i = vectors * V + thread; i < count; i += threads) f(Width<1>{}, i);
}

}  // namespace dsv
