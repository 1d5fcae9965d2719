// A software accelerator for torch: PrivateUse1 device "softgpu" whose streams are real worker threads.
//
// * Device memory is host memory behind another device type, in a caching, stream-ordered allocator like CUDA's: what is
//   freed is handed out again at once to later work of the same stream; freed and fresh memory is poisoned (0xFF: NaN).
// * Ops run the CPU kernels on aliases of device memory. In-place and out= ops are queued on the current stream (the host
//   does not wait); functional ops without out= variant drain the stream first. Tensors of other devices are refused.
// * Copies are queued; pageable ones behave as with CUDA (staged to the device, blocking to the host).
// * A happens-before checker (vector clocks over streams, events, host waits; byte ranges) reports unordered accesses.
// * Host syncs are counted, listed with Python stacks, or refused, as by torch.cuda.set_sync_debug_mode.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <sys/mman.h>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <set>
#include <thread>

namespace softgpu {

using at::Tensor;
using c10::IValue;
using Clock = std::chrono::steady_clock;
using VC = std::vector<uint64_t>;

constexpr int kDevices = 2;
constexpr int kStreams = 33;  // the default one and a pool of 32, as with CUDA
constexpr auto kDev = c10::DeviceType::PrivateUse1;

// --- settings and logs -----------------------------------------------------------------------------------------------

static std::atomic<bool> g_poison{true}, g_async{true}, g_race_on{false};
static std::atomic<int> g_sync_mode{0};  // 0 count, 1 list with stacks, 2 refuse
static std::atomic<int64_t> g_delay[2][2];  // [compute, side][least, most] microseconds before each task
static std::atomic<int64_t> g_ops{0}, g_async_ops{0};
static std::mutex g_log;
static std::map<std::string, int64_t> g_sync_counts;
static std::vector<std::string> g_races, g_violations;
static std::string g_async_error;
static std::set<std::string> g_race_seen;
static py::object* g_on_sync = nullptr;  // (kind, op)
static py::object* g_on_race = nullptr;  // (message)

static void call_python(py::object* f, const std::string& a, const std::string& b) {
  if (f == nullptr || !Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  try { (*f)(a, b); } catch (py::error_already_set& e) { e.restore(); PyErr_Clear(); }
}

static void note_sync(const char* kind, const std::string& op) {
  { std::lock_guard<std::mutex> l(g_log); g_sync_counts[std::string(kind) + ":" + op]++; }
  if (g_sync_mode == 2) TORCH_CHECK(false, "host sync refused: ", kind, " ", op);
  if (g_sync_mode == 1) call_python(g_on_sync, kind, op);
}

static void check_async_error() {
  std::string e;
  { std::lock_guard<std::mutex> l(g_log); std::swap(e, g_async_error); }
  TORCH_CHECK(e.empty(), "softgpu: asynchronous error of an earlier op: ", e);
}

static thread_local uint64_t t_rng = 0;
static int64_t draw(int64_t lo, int64_t hi) {
  static std::atomic<uint64_t> seeds{12345};
  if (!t_rng) t_rng = seeds.fetch_add(0x9E3779B97F4A7C15ull) | 1;
  t_rng ^= t_rng << 13; t_rng ^= t_rng >> 7; t_rng ^= t_rng << 17;
  return lo + int64_t(t_rng % uint64_t(hi - lo + 1));
}

// --- streams and events ----------------------------------------------------------------------------------------------

struct StreamImpl {
  int device, id;
  std::mutex m;
  std::condition_variable cv, done_cv;
  std::deque<std::function<void()>> q;
  uint64_t put = 0, done = 0;
  bool started = false;
  void run() {
    at::set_num_threads(1);
    while (true) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> l(m);
        cv.wait(l, [&] { return !q.empty(); });
        task = std::move(q.front());
        q.pop_front();
      }
      const int side = id != 0;
      if (int64_t hi = g_delay[side][1]) std::this_thread::sleep_for(std::chrono::microseconds(draw(g_delay[side][0], hi)));
      try {
        task();
      } catch (std::exception& e) {
        std::lock_guard<std::mutex> l(g_log);
        if (g_async_error.empty()) g_async_error = e.what();
      }
      task = nullptr;
      { std::lock_guard<std::mutex> l(m); done++; }
      done_cv.notify_all();
    }
  }
  void add(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> l(m);
      if (!started) { started = true; std::thread([this] { run(); }).detach(); }
      q.push_back(std::move(task));
      put++;
    }
    cv.notify_one();
  }
  bool idle() { std::lock_guard<std::mutex> l(m); return done == put; }
  void drain() {
    std::unique_lock<std::mutex> l(m);
    const uint64_t target = put;
    done_cv.wait(l, [&] { return done >= target; });
  }
};

static StreamImpl* streams() {
  static StreamImpl* all = [] {
    auto* s = new StreamImpl[kDevices * kStreams];  // leaked: worker threads use it until the process ends
    for (int i = 0; i < kDevices * kStreams; i++) { s[i].device = i / kStreams; s[i].id = i % kStreams; }
    return s;
  }();
  return all;
}
static int gid(int device, int64_t id) { return device * kStreams + int(id); }
static StreamImpl& stream_of(int device, int64_t id) { return streams()[gid(device, id)]; }

static thread_local int t_device = 0;
static thread_local std::array<int64_t, kDevices> t_current{};
static StreamImpl& current(int device) { return stream_of(device, t_current[device]); }

// --- happens-before checker ------------------------------------------------------------------------------------------

static std::mutex g_hb;
static std::array<VC, kDevices * kStreams> g_vc = [] {
  std::array<VC, kDevices * kStreams> a;
  for (auto& v : a) v.assign(kDevices * kStreams, 0);
  return a;
}();
static VC g_host_vc(kDevices * kStreams, 0);
static thread_local VC* t_host_vc = nullptr;  // of isolated threads
static VC& host_vc() { return t_host_vc ? *t_host_vc : g_host_vc; }
static void merge(VC& into, const VC& from) { for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], from[i]); }

struct Touch { int stream = -1; uint64_t seq = 0; std::string op; };
struct Interval { uintptr_t end; Touch writer; std::vector<Touch> readers; };
static std::map<uintptr_t, Interval> g_touched;
struct Range { uintptr_t begin, end; bool write; };

static void race(const std::string& what, const Touch& before, int stream, const std::string& op) {
  auto name = [](int g) { return g % kStreams == 0 ? std::string("compute") : "side" + std::to_string(g % kStreams); };
  std::string msg = what + ": " + op + " on " + name(stream) + " is not ordered after " + before.op + " on " + name(before.stream);
  bool fresh;
  { std::lock_guard<std::mutex> l(g_log); fresh = g_race_seen.insert(msg).second; if (g_races.size() < 10000) g_races.push_back(msg); }
  if (fresh) call_python(g_on_race, msg, op);
}

// split so that [b, e) is covered by whole intervals; returns them
static std::vector<Interval*> cover(uintptr_t b, uintptr_t e) {
  std::vector<Interval*> out;
  auto split_at = [](uintptr_t at) {
    auto it = g_touched.upper_bound(at);
    if (it == g_touched.begin()) return;
    --it;
    if (it->first < at && it->second.end > at) {
      Interval right = it->second;
      it->second.end = at;
      g_touched.emplace(at, std::move(right));
    }
  };
  split_at(b);
  split_at(e);
  uintptr_t at = b;
  for (auto it = g_touched.lower_bound(b); at < e;) {
    if (it == g_touched.end() || it->first >= e) { out.push_back(&g_touched.emplace_hint(it, at, Interval{e, {}, {}})->second); break; }
    if (it->first > at) out.push_back(&g_touched.emplace_hint(it, at, Interval{it->first, {}, {}})->second);
    out.push_back(&it->second);
    at = it->second.end;
    ++it;
  }
  return out;
}

static void touch(int stream, const std::vector<Range>& ranges, const std::string& op) {
  if (!g_race_on) return;
  std::vector<std::tuple<const char*, Touch>> found;
  {
    std::lock_guard<std::mutex> l(g_hb);
    VC& vc = g_vc[stream];
    merge(vc, host_vc());
    const uint64_t seq = ++vc[stream];
    for (const Range& r : ranges) {
      if (r.begin >= r.end) continue;
      for (Interval* i : cover(r.begin, r.end)) {
        if (i->writer.stream >= 0 && vc[i->writer.stream] < i->writer.seq)
          found.emplace_back(r.write ? "write after write" : "read after write", i->writer);
        if (r.write) {
          for (const Touch& t : i->readers) if (vc[t.stream] < t.seq) found.emplace_back("write after read", t);
          i->writer = {stream, seq, op};
          i->readers.clear();
        } else {
          bool seen = false;
          for (Touch& t : i->readers) if (t.stream == stream) { t = {stream, seq, op}; seen = true; }
          if (!seen) i->readers.push_back({stream, seq, op});
        }
      }
    }
  }
  for (auto& [what, t] : found) race(what, t, stream, op);
}

static void forget_range(uintptr_t b, uintptr_t e) {
  std::lock_guard<std::mutex> l(g_hb);
  cover(b, e);
  g_touched.erase(g_touched.lower_bound(b), g_touched.lower_bound(e));
}

static void host_knows(int stream) { std::lock_guard<std::mutex> l(g_hb); merge(host_vc(), g_vc[stream]); }

// Host code reads or writes host memory that streams may use.
static bool check_host(uintptr_t b, uintptr_t e, bool write, const std::string& op) {
  if (!g_race_on) return true;
  std::vector<Touch> found;
  {
    std::lock_guard<std::mutex> l(g_hb);
    auto it = g_touched.upper_bound(b);
    if (it != g_touched.begin()) --it;
    for (; it != g_touched.end() && it->first < e; ++it) {
      if (it->second.end <= b) continue;
      const VC& vc = host_vc();
      if (it->second.writer.stream >= 0 && vc[it->second.writer.stream] < it->second.writer.seq) found.push_back(it->second.writer);
      if (write) for (const Touch& t : it->second.readers) if (vc[t.stream] < t.seq) found.push_back(t);
    }
  }
  for (auto& t : found) race(write ? "host write" : "host read", t, 0, op + " (host)");
  return found.empty();
}

struct EventState {
  std::mutex m;
  std::condition_variable cv;
  bool done = false;
  Clock::time_point at;
  VC vc;
};
struct EventImpl {
  std::shared_ptr<EventState> state;  // of the last record
  bool timing = false;
  int device = 0;
};

static void drain(StreamImpl& s) { s.drain(); host_knows(gid(s.device, s.id)); check_async_error(); }

// --- memory ----------------------------------------------------------------------------------------------------------

static std::mutex g_graves_m;
static std::vector<c10::Storage> g_graves;  // host memory that queued copies have held; dropped by host threads
static void bury(c10::Storage s) { std::lock_guard<std::mutex> l(g_graves_m); g_graves.push_back(std::move(s)); }
static void clear_graves() {
  std::vector<c10::Storage> old;
  { std::lock_guard<std::mutex> l(g_graves_m); std::swap(old, g_graves); }
}

struct Block {
  char* ptr;
  size_t size;
  int device, stream;  // stream: where it was allocated
  bool used = false;
  Block *prev = nullptr, *next = nullptr;
  std::set<int> other_streams;
};
struct BySize { bool operator()(const Block* a, const Block* b) const { return std::tie(a->stream, a->size, a->ptr) < std::tie(b->stream, b->size, b->ptr); } };

struct CachingAllocator final : c10::DeviceAllocator {
  std::mutex m;
  std::set<Block*, BySize> free_[kDevices][2];  // small, large
  std::map<void*, Block*> used_;
  struct Pending { Block* b; std::vector<std::shared_ptr<std::atomic<bool>>> flags; };
  std::vector<Pending> pending_;
  size_t allocated[kDevices]{}, peak[kDevices]{}, reserved[kDevices]{}, reserved_peak[kDevices]{}, total_alloc[kDevices]{}, total_free[kDevices]{};
  size_t limit[kDevices]{8ull << 30, 8ull << 30};
  int64_t ooms = 0;

  static bool small(size_t n) { return n <= (1 << 20); }
  static size_t rounded(size_t n) { return n < 512 ? 512 : (n + 511) / 512 * 512; }

  Block* find(int device, int stream, size_t n) {
    auto& pool = free_[device][!small(n)];
    Block key{nullptr, n, device, stream};
    auto it = pool.lower_bound(&key);
    if (it == pool.end() || (*it)->stream != stream) return nullptr;
    Block* b = *it;
    pool.erase(it);
    return b;
  }
  void give_back(Block* b) {  // m is held
    for (Block* other : {b->prev, b->next}) {
      if (other == nullptr || other->used || other->other_streams.size()) continue;
      auto& pool = free_[b->device][!is_small_segment(other)];
      auto it = pool.find(other);
      if (it == pool.end()) continue;
      pool.erase(it);
      if (other == b->prev) {
        b->ptr = other->ptr; b->prev = other->prev; if (b->prev) b->prev->next = b;
      } else {
        b->next = other->next; if (b->next) b->next->prev = b;
      }
      b->size += other->size;
      small_segments_.erase(other);
      delete other;
    }
    free_[b->device][!is_small_segment(b)].insert(b);
  }
  std::set<Block*> small_segments_;  // blocks of segments for small allocations
  bool is_small_segment(Block* b) { return small_segments_.count(b) != 0; }

  c10::DataPtr allocate(size_t n) override {
    const int device = t_device;
    const int stream = gid(device, t_current[device]);
    if (n == 0) return {nullptr, nullptr, &raw_delete, c10::Device(kDev, c10::DeviceIndex(device))};
    clear_graves();
    process_pending();
    const size_t size = rounded(n);
    std::unique_lock<std::mutex> l(m);
    Block* b = find(device, stream, size);
    if (b == nullptr) {
      const size_t segment = small(size) ? (2 << 20) : size < (10 << 20) ? (20 << 20) : (size + (2 << 20) - 1) / (2 << 20) * (2 << 20);
      if (reserved[device] + segment > limit[device]) {
        l.unlock();
        emptyCache();
        l.lock();
        if (reserved[device] + segment > limit[device]) {
          ooms++;
          l.unlock();
          TORCH_CHECK_WITH(OutOfMemoryError, false, "softgpu out of memory: tried to allocate ", n, " bytes; ", allocated[device], " allocated");
        }
      }
      void* p = mmap(nullptr, segment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK(p != MAP_FAILED, "mmap failed");
      if (g_poison) std::memset(p, 0xFF, segment);
      reserved[device] += segment;
      reserved_peak[device] = std::max(reserved_peak[device], reserved[device]);
      b = new Block{static_cast<char*>(p), segment, device, stream};
      if (small(size)) small_segments_.insert(b);
    }
    const bool split = is_small_segment(b) ? b->size - size >= 512 : b->size - size > (1 << 20);
    if (split) {
      Block* rest = new Block{b->ptr + size, b->size - size, device, stream};
      rest->prev = b; rest->next = b->next; if (rest->next) rest->next->prev = rest;
      b->next = rest; b->size = size;
      if (is_small_segment(b)) small_segments_.insert(rest);
      free_[device][!is_small_segment(rest)].insert(rest);
    }
    b->used = true;
    used_[b->ptr] = b;
    allocated[device] += b->size;
    total_alloc[device] += b->size;
    peak[device] = std::max(peak[device], allocated[device]);
    return {b->ptr, b->ptr, &raw_delete, c10::Device(kDev, c10::DeviceIndex(device))};
  }
  static void raw_delete(void* p);
  void free(void* p) {
    if (p == nullptr) return;
    std::vector<std::shared_ptr<std::atomic<bool>>> flags;
    Block* b;
    {
      std::lock_guard<std::mutex> l(m);
      auto it = used_.find(p);
      if (it == used_.end()) return;
      b = it->second;
      used_.erase(it);
      allocated[b->device] -= b->size;
      total_free[b->device] += b->size;
    }
    if (b->other_streams.empty()) {
      poison(b);
      std::lock_guard<std::mutex> l(m);
      b->used = false;
      give_back(b);
      return;
    }
    for (int s : b->other_streams) {
      auto flag = std::make_shared<std::atomic<bool>>(false);
      flags.push_back(flag);
      streams()[s].add([flag] { *flag = true; });
    }
    std::lock_guard<std::mutex> l(m);
    pending_.push_back({b, std::move(flags)});
  }
  void poison(Block* b) {  // as if the memory were used for something else at once
    const auto begin = reinterpret_cast<uintptr_t>(b->ptr);
    touch(b->stream, {{begin, begin + b->size, true}}, "free");
    if (!g_poison) return;
    char* p = b->ptr;
    const size_t n = b->size;
    streams()[b->stream].add([p, n] { std::memset(p, 0xFF, n); });
  }
  void process_pending() {
    std::vector<Block*> ready;
    {
      std::lock_guard<std::mutex> l(m);
      for (size_t i = 0; i < pending_.size();) {
        bool all = true;
        for (auto& f : pending_[i].flags) all &= f->load();
        if (all) { ready.push_back(pending_[i].b); pending_[i] = std::move(pending_.back()); pending_.pop_back(); } else i++;
      }
    }
    for (Block* b : ready) {
      for (int s : b->other_streams) { std::lock_guard<std::mutex> l(g_hb); merge(g_vc[b->stream], g_vc[s]); }
      b->other_streams.clear();
      poison(b);
      std::lock_guard<std::mutex> l(m);
      b->used = false;
      give_back(b);
    }
  }
  at::DeleterFnPtr raw_deleter() const override { return &raw_delete; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    for (int i = 0; i < kDevices * kStreams; i++) if (streams()[i].started) streams()[i].drain();
    process_pending();
    for (int i = 0; i < kDevices * kStreams; i++) if (streams()[i].started) streams()[i].drain();
    std::lock_guard<std::mutex> l(m);
    for (int d = 0; d < kDevices; d++)
      for (auto& pool : free_[d])
        for (auto it = pool.begin(); it != pool.end();) {
          Block* b = *it;
          if (b->prev || b->next) { ++it; continue; }
          it = pool.erase(it);
          small_segments_.erase(b);
          const auto begin = reinterpret_cast<uintptr_t>(b->ptr);
          forget_range(begin, begin + b->size);
          munmap(b->ptr, b->size);
          reserved[d] -= b->size;
          delete b;
        }
  }
  void recordStream(const c10::DataPtr& ptr, c10::Stream stream) override {
    if (!ptr.get()) return;
    std::lock_guard<std::mutex> l(m);
    auto it = used_.find(ptr.get());
    if (it == used_.end()) return;
    const int s = gid(stream.device_index(), stream.id());
    if (s != it->second->stream) it->second->other_streams.insert(s);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex d) override {
    std::lock_guard<std::mutex> l(m);
    c10::CachingDeviceAllocator::DeviceStats s;
    auto set = [](c10::CachingAllocator::StatArray& a, size_t now, size_t most, size_t in, size_t out) {
      a[0].current = int64_t(now); a[0].peak = int64_t(most); a[0].allocated = int64_t(in); a[0].freed = int64_t(out);
    };
    set(s.allocated_bytes, allocated[d], peak[d], total_alloc[d], total_free[d]);
    set(s.active_bytes, allocated[d], peak[d], total_alloc[d], total_free[d]);
    set(s.requested_bytes, allocated[d], peak[d], total_alloc[d], total_free[d]);
    set(s.reserved_bytes, reserved[d], reserved_peak[d], 0, 0);
    s.num_ooms = ooms;
    return s;
  }
  void resetAccumulatedStats(c10::DeviceIndex d) override { total_alloc[d] = total_free[d] = 0; }
  void resetPeakStats(c10::DeviceIndex d) override { std::lock_guard<std::mutex> l(m); peak[d] = allocated[d]; reserved_peak[d] = reserved[d]; }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex d) override { return {limit[d] - reserved[d], limit[d]}; }
};
static CachingAllocator* allocator() { static auto* a = new CachingAllocator; return a; }
void CachingAllocator::raw_delete(void* p) { allocator()->free(p); }

// Page-locked host memory: torch's own, and what cudaHostRegister would have locked.
static std::mutex g_pin_m;
static std::map<uintptr_t, std::pair<size_t, bool>> g_pinned;  // begin -> size, torch's own
static std::multimap<uintptr_t, uintptr_t> g_host_pending;     // ranges of registered memory that queued copies use
static const std::pair<const uintptr_t, std::pair<size_t, bool>>* pinned_range(uintptr_t p) {
  auto it = g_pinned.upper_bound(p);
  if (it == g_pinned.begin()) return nullptr;
  --it;
  return p < it->first + it->second.first ? &*it : nullptr;
}
static int pin_kind(const void* p) {  // 0 pageable, 1 torch's own, 2 registered
  std::lock_guard<std::mutex> l(g_pin_m);
  auto* r = pinned_range(reinterpret_cast<uintptr_t>(p));
  return r == nullptr ? 0 : r->second.second ? 1 : 2;
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    clear_graves();
    const size_t size = std::max<size_t>(n, 1);
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "mmap failed");
    std::lock_guard<std::mutex> l(g_pin_m);
    g_pinned[reinterpret_cast<uintptr_t>(p)] = {size, true};
    return {p, p, &drop, at::Device(at::kCPU)};
  }
  static void drop(void* p) {
    if (p == nullptr) return;
    const auto begin = reinterpret_cast<uintptr_t>(p);
    size_t size = 0;
    {
      std::lock_guard<std::mutex> l(g_pin_m);
      auto it = g_pinned.find(begin);
      if (it == g_pinned.end()) return;
      size = it->second.first;
      g_pinned.erase(it);
    }
    forget_range(begin, begin + size);
    munmap(p, size);
  }
  at::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
};
static PinnedAllocator* pinned_allocator() { static auto* a = new PinnedAllocator; return a; }

// --- guard, hooks, generator -----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDev; }
  c10::Device exchangeDevice(c10::Device d) const override { auto old = getDevice(); setDevice(d); return old; }
  c10::Device getDevice() const override { return {kDev, c10::DeviceIndex(t_device)}; }
  void setDevice(c10::Device d) const override { TORCH_CHECK(d.index() < kDevices, "no such device: ", d); if (d.index() >= 0) t_device = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { if (d.index() >= 0) t_device = d.index(); }
  static int index(c10::Device d) { return d.index() < 0 ? t_device : d.index(); }
  static c10::Stream wrap(int device, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDev, c10::DeviceIndex(device)), id); }
  c10::Stream getStream(c10::Device d) const override { return wrap(index(d), t_current[index(d)]); }
  c10::Stream getDefaultStream(c10::Device d) const override { return wrap(index(d), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(c10::Device d, int) const override {
    static std::atomic<int> next{0};
    return wrap(index(d), 1 + next++ % (kStreams - 1));
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = wrap(s.device_index(), t_current[s.device_index()]);
    t_current[s.device_index()] = s.id();
    return old;
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return &stream_of(s.device_index(), s.id()); }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete static_cast<EventImpl*>(e); }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag flag) const override {
    if (*e == nullptr) *e = new EventImpl{nullptr, flag == c10::EventFlag::BACKEND_DEFAULT, s.device_index()};
    auto state = std::make_shared<EventState>();
    static_cast<EventImpl*>(*e)->state = state;
    const int g = gid(s.device_index(), s.id());
    if (g_race_on) { std::lock_guard<std::mutex> l(g_hb); merge(g_vc[g], host_vc()); state->vc = g_vc[g]; }
    streams()[g].add([state] {
      { std::lock_guard<std::mutex> l(state->m); state->done = true; state->at = Clock::now(); }
      state->cv.notify_all();
    });
  }
  void block(void* e, const c10::Stream& s) const override {
    auto state = e ? static_cast<EventImpl*>(e)->state : nullptr;
    if (!state) return;
    const int g = gid(s.device_index(), s.id());
    if (!state->vc.empty()) { std::lock_guard<std::mutex> l(g_hb); merge(g_vc[g], state->vc); }
    streams()[g].add([state] { std::unique_lock<std::mutex> l(state->m); state->cv.wait(l, [&] { return state->done; }); });
  }
  bool queryEvent(void* e) const override {
    auto state = e ? static_cast<EventImpl*>(e)->state : nullptr;
    if (!state) return true;
    {
      std::lock_guard<std::mutex> l(state->m);
      if (!state->done) return false;
    }
    if (!state->vc.empty()) { std::lock_guard<std::mutex> l(g_hb); merge(host_vc(), state->vc); }  // the host knows now
    return true;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
  bool queryStream(const c10::Stream& s) const override { return stream_of(s.device_index(), s.id()).idle(); }
  void synchronizeStream(const c10::Stream& s) const override { note_sync("stream", "synchronize"); drain(stream_of(s.device_index(), s.id())); }
  void synchronizeEvent(void* e) const override {
    auto state = e ? static_cast<EventImpl*>(e)->state : nullptr;
    if (!state) return;
    note_sync("event", "synchronize");
    { std::unique_lock<std::mutex> l(state->m); state->cv.wait(l, [&] { return state->done; }); }
    if (!state->vc.empty()) { std::lock_guard<std::mutex> l(g_hb); merge(host_vc(), state->vc); }
    check_async_error();
  }
  void synchronizeDevice(const c10::DeviceIndex d) const override {
    note_sync("device", "synchronize");
    for (int i = 0; i < kStreams; i++) if (stream_of(d, i).started) drain(stream_of(d, i));
  }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override { allocator()->recordStream(p, s); }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    auto *x = static_cast<EventImpl*>(a), *y = static_cast<EventImpl*>(b);
    TORCH_CHECK(x && y && x->state && y->state, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(x->timing && y->timing, "Both events must be created with timing enabled.");
    TORCH_CHECK(queryEvent(a) && queryEvent(b), "Both events must be completed before calculating elapsed time.");
    return std::chrono::duration<double, std::milli>(y->state->at - x->state->at).count();
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(c10::DeviceIndex i) { device_ = c10::Device(kDev, i); key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }
};
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex d) const override { Guard().setDevice({kDev, d}); }
  c10::DeviceIndex getCurrentDevice() const override { return c10::DeviceIndex(t_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { auto old = t_device; if (d >= 0) t_device = d; return c10::DeviceIndex(old); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* p) const override { return pin_kind(p) != 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Device getDeviceFromPtr(void* p) const override {
    std::lock_guard<std::mutex> l(allocator()->m);
    auto it = allocator()->used_.upper_bound(p);
    if (it != allocator()->used_.begin()) { --it; return {kDev, c10::DeviceIndex(it->second->device)}; }
    return {kDev, 0};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override {
    static std::vector<at::Generator> all = [] { std::vector<at::Generator> v; for (int d = 0; d < kDevices; d++) v.push_back(at::make_generator<DeviceGenerator>(c10::DeviceIndex(d))); return v; }();
    return all[i < 0 ? t_device : i];
  }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return at::make_generator<DeviceGenerator>(i < 0 ? c10::DeviceIndex(t_device) : i); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    c10::DeviceGuard guard(storage.device());
    auto fresh = allocator()->allocate(n);
    const size_t both = std::min(n, storage.nbytes());
    if (both) {
      void *to = fresh.get(); const void* from = storage.data();
      const int g = gid(storage.device().index(), t_current[storage.device().index()]);
      touch(g, {{reinterpret_cast<uintptr_t>(from), reinterpret_cast<uintptr_t>(from) + both, false}, {reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(to) + both, true}}, "resize");
      streams()[g].add([=] { std::memcpy(to, from, both); });
    }
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(n);
  }
};

// --- ops -------------------------------------------------------------------------------------------------------------

static bool on_device(const Tensor& t) { return t.defined() && t.device().type() == kDev; }

static Range range_of(const Tensor& t, bool write) {
  if (t.numel() == 0) return {0, 0, write};
  int64_t lo = 0, hi = 0;
  for (int64_t d = 0; d < t.dim(); d++) (t.stride(d) < 0 ? lo : hi) += (t.size(d) - 1) * t.stride(d);
  const auto p = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {p + lo * t.element_size(), p + (hi + 1) * t.element_size(), write};
}

static Tensor cpu_alias(const Tensor& t) {
  void* p = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
  Tensor out = at::from_blob(p, t.sizes(), t.strides(), at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU));
  if (t.is_conj()) out._set_conj(true);
  if (t.is_neg()) out._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

static Tensor to_device_result(const Tensor& cpu, int device) {
  if (!cpu.defined() || cpu.device().type() == kDev) return cpu;
  c10::DeviceGuard guard(c10::Device(kDev, c10::DeviceIndex(device)));
  Tensor out = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(c10::Device(kDev, c10::DeviceIndex(device))));
  if (cpu.numel()) {
    touch(gid(device, t_current[device]), {range_of(out, true)}, "result");
    // The stream was drained, but freed memory may have been poisoned on it since.
    Tensor to = cpu_alias(out), from = cpu;
    current(device).add([to, from]() mutable { to.copy_(from); });
    current(device).drain();
  }
  return out;
}

template <class F>
static IValue map_tensors(const IValue& v, F f) {
  if (v.isTensor()) return f(v.toTensor());
  if (v.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& t : v.toTensorVector()) out.push_back(f(t));
    return out;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) out.push_back(t ? std::optional<Tensor>(f(*t)) : t);
    return out;
  }
  return v;
}

static bool takes_cpu_indices(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::index_put" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
}

static void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(stack);
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::InferenceMode normal(false);  // the aliases made here are used in a worker thread, outside of inference mode
  check_async_error();
  clear_graves();
  g_ops++;
  const auto& schema = op.schema();
  const std::string name = schema.name();
  const auto& params = schema.arguments();
  const size_t nargs = params.size(), first = stack->size() - nargs;
  std::vector<IValue> args(stack->begin() + int64_t(first), stack->end());

  int device = -1;
  for (const IValue& v : args) {
    map_tensors(v, [&](const Tensor& t) {
      if (on_device(t)) {
        TORCH_CHECK(device < 0 || device == t.device().index(), "Expected all tensors to be on the same device, but found at least two devices, softgpu:", device, " and ", t.device(), "! (", name, ")");
        device = t.device().index();
      }
      return t;
    });
    if (device < 0 && v.isDevice() && v.toDevice().type() == kDev) device = Guard::index(v.toDevice());
  }
  if (device < 0) device = t_device;
  StreamImpl& stream = current(device);
  const int g = gid(device, stream.id);

  // CPU tensors: 0-dim ones are read now, as by a kernel launch; others are refused.
  for (size_t i = 0; i < nargs; i++)
    args[i] = map_tensors(args[i], [&](const Tensor& t) -> Tensor {
      if (!t.defined() || on_device(t)) return t;
      if (t.device().type() == at::kCPU && t.dim() == 0 && !(params[i].alias_info() && params[i].alias_info()->isWrite())) {
        Tensor copy = t.detach().clone();
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
        return copy;
      }
      if (takes_cpu_indices(name) && i > 0) return t.to(c10::Device(kDev, c10::DeviceIndex(device)));
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, softgpu:", device, " and ", t.device(), "! (", name, ", argument ", params[i].name(), ", shape ", t.sizes(), ")");
    });

  const auto& returns = schema.returns();
  bool in_place = true, writes = false, fresh_out = false, view = false;
  for (const auto& r : returns) {
    if (r.alias_info() == nullptr) in_place = false;
    else if (!r.alias_info()->isWrite()) { in_place = false; view = true; }
  }
  TORCH_CHECK(!view, "softgpu: the view op ", name, " has no kernel");
  std::vector<Range> ranges;
  for (size_t i = 0; i < nargs; i++) {
    const bool w = params[i].alias_info() && params[i].alias_info()->isWrite();
    map_tensors(args[i], [&](const Tensor& t) {
      if (on_device(t)) {
        ranges.push_back(range_of(t, w));
        writes |= w;
        if (w && params[i].is_out() && t.numel() == 0) fresh_out = true;
      }
      return t;
    });
  }
  std::stable_sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.write < b.write; });
  const bool random = op.hasTag(at::Tag::nondeterministic_seeded);
  bool host_result = false;
  for (const auto& r : returns) host_result |= r.type()->kind() != c10::TypeKind::TensorType && r.type()->kind() != c10::TypeKind::ListType;
  if (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output) || host_result) note_sync("op", name);

  std::vector<std::pair<at::Generator, at::Generator>> generators;  // ours, and a CPU one in its place
  std::vector<std::pair<Tensor, Tensor>> outs;                      // ours, to be resized, and a CPU one in its place
  torch::jit::Stack cpu;
  for (size_t i = 0; i < nargs; i++) {
    IValue v = map_tensors(args[i], [&](const Tensor& t) -> Tensor {
      if (!on_device(t)) return t;
      if (fresh_out && params[i].is_out() && t.numel() == 0) {
        outs.emplace_back(t, at::empty({0}, at::TensorOptions().dtype(t.scalar_type())));
        return outs.back().second;
      }
      return cpu_alias(t);
    });
    if (v.isDevice() && v.toDevice().type() == kDev) v = c10::Device(at::kCPU);
    if (v.isGenerator() && v.toGenerator().device().type() == kDev) {
      auto ours = v.toGenerator();
      auto theirs = at::make_generator<at::CPUGeneratorImpl>();
      theirs.set_state(ours.get_state());
      generators.emplace_back(ours, theirs);
      v = theirs;
    }
    if (params[i].name() == "pin_memory" && v.isBool()) v = false;
    cpu.push_back(std::move(v));
  }
  touch(g, ranges, name);

  if (in_place && writes && !fresh_out && !random && g_async) {
    g_async_ops++;
    stream.add([op, cpu = std::move(cpu)]() mutable { run_on_cpu(op, cpu); });
    std::vector<IValue> results;
    for (const auto& r : returns)
      for (size_t i = 0; i < nargs; i++)
        if (params[i].alias_info() && *params[i].alias_info() == *r.alias_info()) { results.push_back((*stack)[first + i]); break; }
    stack->resize(first);
    for (auto& r : results) stack->push_back(std::move(r));
    return;
  }

  stream.drain();
  check_async_error();
  run_on_cpu(op, cpu);
  for (auto& [ours, theirs] : generators) ours.set_state(theirs.get_state());
  for (auto& [ours, theirs] : outs) {
    at::native::resize_(ours, theirs.sizes(), std::nullopt);
    Tensor to = ours.numel() ? cpu_alias(ours) : Tensor(), from = theirs;
    if (to.defined()) { touch(g, {range_of(ours, true)}, name); stream.add([to, from]() mutable { to.copy_(from); }); stream.drain(); }
  }
  std::vector<IValue> results;
  for (size_t r = 0; r < returns.size(); r++) {
    if (returns[r].alias_info() && returns[r].alias_info()->isWrite()) {
      for (size_t i = 0; i < nargs; i++)
        if (params[i].alias_info() && *params[i].alias_info() == *returns[r].alias_info()) { results.push_back((*stack)[first + i]); break; }
    } else {
      results.push_back(map_tensors(cpu[r], [&](const Tensor& t) { return to_device_result(t, device); }));
    }
  }
  stack->resize(first);
  for (auto& r : results) stack->push_back(std::move(r));
}

// --- kernels ---------------------------------------------------------------------------------------------------------

static Tensor empty_memory_format(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::Device(kDev, c10::DeviceIndex(Guard::index(c10::device_or_default(device)))));
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::Device(kDev, c10::DeviceIndex(Guard::index(c10::device_or_default(device)))));
  return at::detail::empty_strided_generic(size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

static Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  c10::InferenceMode normal(false);
  check_async_error();
  clear_graves();
  g_ops++;
  if (dst.numel() == 0) return dst;
  at::NoGradGuard no_grad;
  if (self.sizes() != dst.sizes()) return copy_from(self.expand(dst.sizes()), dst, non_blocking);
  const Tensor& there = on_device(dst) ? dst : self;
  const int device = there.device().index();
  StreamImpl& stream = current(device);
  const int g = gid(device, stream.id);
  const bool h2d = !on_device(self), d2h = !on_device(dst);
  if (!h2d && !d2h) {
    touch(g, {range_of(self, false), range_of(dst, true)}, "copy");
    if (self.device() != dst.device()) { current(self.device().index()).drain(); }
    Tensor to = cpu_alias(dst), from = cpu_alias(self);
    stream.add([to, from]() mutable { at::AutoDispatchBelowADInplaceOrView guard; to.copy_(from); });
    return dst;
  }
  const Tensor& host = h2d ? self : dst;
  TORCH_CHECK(host.device().type() == at::kCPU, "copy between ", self.device(), " and ", dst.device());
  const int kind = pin_kind(host.const_data_ptr());
  const Range hr = range_of(host, d2h);
  Tensor host_alias = at::from_blob(const_cast<void*>(host.const_data_ptr()), host.sizes(), host.strides(), host.options());
  const char* what = h2d ? "load (host to device)" : "save (device to host)";
  if (h2d && kind == 0) host_alias = host.detach().clone();  // staged now
  const bool wait = !non_blocking || (d2h && kind == 0);
  std::vector<Range> ranges{range_of(there, h2d)};
  if (!(h2d && kind == 0)) ranges.push_back(hr);
  if (h2d && kind == 0) check_host(hr.begin, hr.end, false, "staging of pageable memory");
  touch(g, ranges, what);
  if (kind == 2 && !wait) { std::lock_guard<std::mutex> l(g_pin_m); g_host_pending.emplace(hr.begin, hr.end); }
  c10::Storage keep = kind == 1 ? host.storage() : c10::Storage();
  Tensor to = h2d ? cpu_alias(dst) : host_alias, from = h2d ? host_alias : cpu_alias(self);
  const bool track = kind == 2 && !wait;
  stream.add([to, from, keep, hr, track]() mutable {
    at::AutoDispatchBelowADInplaceOrView guard;
    to.copy_(from);
    if (keep) bury(std::move(keep));
    if (track) {
      std::lock_guard<std::mutex> l(g_pin_m);
      for (auto [it, end] = g_host_pending.equal_range(hr.begin); it != end; ++it) if (it->second == hr.end) { g_host_pending.erase(it); break; }
    }
  });
  if (wait) {
    note_sync(!non_blocking ? "copy" : "pageable copy", h2d ? "host to device" : "device to host");
    drain(stream);
  }
  return dst;
}
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  at::native::resize_(dst, self.sizes(), std::nullopt);
  return copy_from(self, dst, false);
}
static at::Scalar local_scalar_dense(const Tensor& self) {
  note_sync("item", "aten::_local_scalar_dense");
  const int device = self.device().index();
  touch(gid(device, current(device).id), {range_of(self, false)}, "item");
  drain(current(device));
  return cpu_alias(self).item();
}
static bool equal(const Tensor& self, const Tensor& other) {
  TORCH_CHECK(self.device() == other.device(), "Expected all tensors to be on the same device, but found at least two devices, ", self.device(), " and ", other.device(), "! (aten::equal)");
  note_sync("op", "aten::equal");
  const int device = self.device().index();
  touch(gid(device, current(device).id), {range_of(self, false), range_of(other, false)}, "equal");
  drain(current(device));
  return at::equal(cpu_alias(self), cpu_alias(other));
}
static Tensor as_strided(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) { return at::native::as_strided_tensorimpl(self, size, stride, offset); }
static Tensor view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }
static Tensor reshape_alias(const Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride) { return at::native::_reshape_alias(self, size, stride); }
static Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(self, dim, size, step); }
static const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) { return at::native::resize_(self, size, format); }
static Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }
static Tensor& set_storage(Tensor& self, at::Storage source) { return at::native::set_(self, source); }
static Tensor& set_storage_offset(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}
static Tensor& set_empty(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator(), true);
  self.set_(storage, 0, {0}, {});
  return self;
}
static void record_stream(Tensor& self, c10::Stream s) { allocator()->recordStream(self.storage().data_ptr(), s); }

// As for CUDA: module.to(device) keeps the Parameter objects (torch knows only its own dense backends here).
static bool compatible(const Tensor& self, const Tensor& from) {
  auto plain = [](const Tensor& t) { return t.layout() == at::kStrided && (on_device(t) || t.device().type() == at::kCPU); };
  return (plain(self) && plain(from)) || self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_has_compatible_shallow_copy_type", TORCH_FN(compatible)); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at::autocast;
#define _KERNEL_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define _KERNEL_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define _KERNEL_FP32_SET(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define _KERNEL_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(_KERNEL_LOWER)
  AT_FORALL_FP32(_KERNEL_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(_KERNEL_FP32_SET)
  AT_FORALL_PROMOTE(_KERNEL_PROMOTE)
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty_memory_format));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("unfold", TORCH_FN(unfold));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  m.impl("equal", TORCH_FN(equal));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_offset));
  m.impl("set_", TORCH_FN(set_empty));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(compatible));
  // These have composite kernels that round differently from the CPU's own.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

static const int init = [] {
  c10::register_privateuse1_backend("softgpu");
  c10::SetAllocator(kDev, allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return 0;
}();

}  // namespace softgpu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace softgpu;
  using release = py::call_guard<py::gil_scoped_release>;
  at::globalContext().lazyInitDevice(kDev);
  m.def("set_device", [](int d) { Guard().setDevice({kDev, c10::DeviceIndex(d)}); });
  m.def("current_device", [] { return t_device; });
  m.def("device_count", [] { return kDevices; });
  m.def("synchronize", [](int d) { Guard().synchronizeDevice(c10::DeviceIndex(d)); }, release());
  m.def("empty_cache", [] { allocator()->emptyCache(); }, release());
  m.def("reset_peak", [](int d) { allocator()->resetPeakStats(c10::DeviceIndex(d)); });
  m.def("memory", [](int d) {
    auto* a = allocator();
    std::lock_guard<std::mutex> l(a->m);
    return std::map<std::string, size_t>{{"allocated", a->allocated[d]}, {"allocated_peak", a->peak[d]}, {"reserved", a->reserved[d]}, {"reserved_peak", a->reserved_peak[d]}, {"limit", a->limit[d]}};
  });
  m.def("set_memory_limit", [](int d, size_t n) { allocator()->limit[d] = n; });
  m.def("default_generator", [](int d) { return Hooks().getDefaultGenerator(c10::DeviceIndex(d)); });
  m.def("sleep", [](int64_t us) {
    StreamImpl& s = current(t_device);
    s.add([us] { std::this_thread::sleep_for(std::chrono::microseconds(us)); });
  });
  m.def("set_delays", [](int64_t c0, int64_t c1, int64_t s0, int64_t s1) { g_delay[0][0] = c0; g_delay[0][1] = c1; g_delay[1][0] = s0; g_delay[1][1] = s1; });
  m.def("set_async", [](bool on) { g_async = on; });
  m.def("set_poison", [](bool on) { g_poison = on; });
  m.def("ops", [] { return std::make_pair(g_ops.load(), g_async_ops.load()); });
  m.def("set_sync_mode", [](int mode, py::object f) { if (mode == 1) g_on_sync = new py::object(f); g_sync_mode = mode; });
  m.def("sync_counts", [](bool clear) { std::lock_guard<std::mutex> l(g_log); auto c = g_sync_counts; if (clear) g_sync_counts.clear(); return c; });
  m.def("set_race_check", [](bool on, py::object f) {
    g_on_race = f.is_none() ? nullptr : new py::object(f);
    { py::gil_scoped_release r; for (int i = 0; i < kDevices * kStreams; i++) if (streams()[i].started) streams()[i].drain(); }
    std::lock_guard<std::mutex> l(g_hb);
    g_touched.clear();
    g_race_on = on;
  });
  m.def("races", [](bool clear) { std::lock_guard<std::mutex> l(g_log); auto r = g_races; if (clear) { g_races.clear(); g_race_seen.clear(); } return r; });
  m.def("violations", [](bool clear) { std::lock_guard<std::mutex> l(g_log); auto r = g_violations; if (clear) g_violations.clear(); return r; });
  m.def("isolate_thread", [] { t_host_vc = new VC(kDevices * kStreams, 0); });
  m.def("export_clock", [] { std::lock_guard<std::mutex> l(g_hb); return host_vc(); });
  m.def("import_clock", [](const VC& vc) { std::lock_guard<std::mutex> l(g_hb); merge(host_vc(), vc); });
  m.def("check_host", [](uintptr_t p, size_t n, bool write, const std::string& op) { return check_host(p, p + n, write, op); }, release());
  m.def("host_register", [](uintptr_t p, size_t n) -> int {
    std::lock_guard<std::mutex> l(g_pin_m);
    if (n == 0 || pinned_range(p)) return 712;  // cudaErrorHostMemoryAlreadyRegistered
    g_pinned[p] = {n, false};
    return 0;
  });
  m.def("host_unregister", [](uintptr_t p) -> int {
    size_t n = 0;
    bool pending = false;
    {
      std::lock_guard<std::mutex> l(g_pin_m);
      auto it = g_pinned.find(p);
      if (it == g_pinned.end() || it->second.second) return 713;
      n = it->second.first;
      for (auto& [b, e] : g_host_pending) pending |= b < p + n && e > p;
      g_pinned.erase(it);
    }
    if (pending) {
      call_python(g_on_race, "violation: page-locked host memory is unregistered while a queued copy still uses it", "");
      { std::lock_guard<std::mutex> k(g_log); g_violations.push_back("page-locked host memory was unregistered while a copy still uses it"); }
      // The process would crash when the memory is unmapped next; whether CUDA waits here is not documented.
      for (int i = 0; i < kDevices * kStreams; i++) if (streams()[i].started) streams()[i].drain();
    }
    check_host(p, p + n, true, "unregister page-locked memory");  // whether or not the copies are done by chance
    forget_range(p, p + n);
    return 0;
  }, release());
  m.def("pin_kind", [](uintptr_t p) { return pin_kind(reinterpret_cast<void*>(p)); });
}
