// CUDA runtime of simulated GPUs, which copy but do not compute: new memory is zero, and remains so
// where kernels would write. It counts how often the host waits for a device, and the copies from
// devices to the host. Functions without an effect are in a generated file.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

enum Kind { kUnknown, kHost, kDevice };

struct Block {
  size_t size;
  Kind kind;
};

std::mutex mutex;
std::map<const char*, Block> blocks;  // by their first byte
std::atomic<long> waits{0}, copies_to_host{0};
thread_local int current_device = 0;

cudaError_t allocate(void** pointer, size_t size, Kind kind) {
  const size_t page = 4096;
  size = size ? (size + page - 1) / page * page : page;
  if (posix_memalign(pointer, page, size)) return cudaErrorMemoryAllocation;
  memset(*pointer, 0, size);
  std::lock_guard<std::mutex> lock(mutex);
  blocks[(const char*)*pointer] = {size, kind};
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  if (blocks.erase((const char*)pointer)) free(pointer);
  return cudaSuccess;
}

Kind kind_of(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto block = blocks.upper_bound((const char*)pointer);
  if (block == blocks.begin()) return kUnknown;
  --block;
  return (const char*)pointer < block->first + block->second.size ? block->second.kind : kUnknown;
}

cudaError_t copy(void* to, const void* from, size_t size) {
  if (kind_of(from) == kDevice && kind_of(to) != kDevice) copies_to_host++;
  memmove(to, from, size);
  return cudaSuccess;
}

// what torch creates and only passes back
template <typename Handle>
cudaError_t create(Handle* handle) {
  *handle = (Handle)malloc(16);
  return cudaSuccess;
}

int no_operation() { return 0; }

}  // namespace

extern "C" {

void simulated_gpu_counts(long* waits_and_copies) {
  waits_and_copies[0] = waits;
  waits_and_copies[1] = copies_to_host;
}

// waits
cudaError_t cudaDeviceSynchronize() { waits++; return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { waits++; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { waits++; return cudaSuccess; }

// copies
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  waits++;
  return copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, size);
}

// memory
cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(pointer, size, kDevice); }
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  return allocate(pointer, size, kHost);
}
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = 78ul << 30;
  *total = 80ul << 30;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  const Kind kind = kind_of(pointer);
  attributes->type = kind == kDevice ? cudaMemoryTypeDevice
                     : kind == kHost ? cudaMemoryTypeHost
                                     : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbols[65536];
  *pointer = symbols;
  return cudaSuccess;
}

// devices: like an H100 of 80 GB
cudaError_t cudaGetDeviceCount(int* count) {
  const char* asked = getenv("SIMULATED_GPUS");
  *count = asked ? atoi(asked) : 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "simulated GPU");
  properties->major = 9;
  properties->pciBusID = device + 1;
  properties->totalGlobalMem = 80ul << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->regsPerBlock = 65536;
  properties->l2CacheSize = 50 << 20;
  properties->totalConstMem = 65536;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  strncpy(id, device ? "0000:02:00.0" : "0000:01:00.0", length);
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDART_VERSION; return cudaSuccess; }
// the library also stands for the driver, libcuda.so.1, of which torch asks only this
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  const bool is_state = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = is_state ? (void*)cuDevicePrimaryCtxGetState : (void*)no_operation;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// streams and events: everything is done at once
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return create(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return create(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return create(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;
  return cudaSuccess;
}

// kernels: torch's code registers them and launches nothing
void** __cudaRegisterFatBinary(void*) { static void* handle[8]; return handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
cudaError_t __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks_per_processor, const void*, int, size_t, unsigned) {
  *blocks_per_processor = 2;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}

}  // extern "C"
