// cuBLAS and NCCL of simulated GPUs: every rank has the same values. Matrix products and other
// functions without an effect are in a generated file.
#include <cstdlib>
#include <cstring>

namespace {

struct Id {
  char bytes[128];
};

struct Communicator {
  int size, rank;
};

int connect(Communicator** communicator, int size, int rank) {
  *communicator = new Communicator{size, rank};
  return 0;
}

// of ncclDataType_t: int8, uint8, int32, uint32, int64, uint64, half, float, double, bfloat16
size_t bytes(size_t count, int type) {
  static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return count * sizes[type];
}

}  // namespace

extern "C" {

int ncclAllReduce(const void* from, void* to, size_t count, int type) {
  memmove(to, from, bytes(count, type));
  return 0;
}
int ncclBroadcast(const void* from, void* to, size_t count, int type) {
  memmove(to, from, bytes(count, type));
  return 0;
}
int ncclAllGather(
    const void* from, void* to, size_t count, int type, const Communicator* communicator) {
  const size_t size = bytes(count, type);
  for (int i = 0; i < communicator->size; i++) memmove((char*)to + i * size, from, size);
  return 0;
}

int ncclGetUniqueId(Id* id) { memset(id, 7, sizeof *id); return 0; }
int ncclCommInitRank(Communicator** communicator, int size, Id, int rank) {
  return connect(communicator, size, rank);
}
int ncclCommInitRankConfig(Communicator** communicator, int size, Id, int rank, void*) {
  return connect(communicator, size, rank);
}
int ncclCommInitRankScalable(Communicator** communicator, int size, int rank, int, Id*, void*) {
  return connect(communicator, size, rank);
}
int ncclCommCount(const Communicator* communicator, int* size) { *size = communicator->size; return 0; }
int ncclCommUserRank(const Communicator* communicator, int* rank) {
  *rank = communicator->rank;
  return 0;
}
int ncclCommGetAsyncError(Communicator*, int* error) { *error = 0; return 0; }
int ncclGetVersion(int* version) { *version = 23007; return 0; }
const char* ncclGetErrorString(int) { return "simulated"; }
const char* ncclGetLastError(Communicator*) { return "simulated"; }

int cublasCreate_v2(void** handle) { *handle = malloc(64); return 0; }
int cublasLtCreate(void** handle) { *handle = malloc(64); return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion() { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}
int cublasLtMatmulDescCreate(void** descriptor, int, int) { *descriptor = malloc(256); return 0; }
int cublasLtMatrixLayoutCreate(void** layout, int, unsigned long, unsigned long, long) {
  *layout = malloc(256);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** preference) { *preference = malloc(256); return 0; }

}  // extern "C"
