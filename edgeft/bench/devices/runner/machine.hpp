// What the machine tells of itself: clocks, heat, load, memory, the CPU's features. What cannot be read is null.
#pragma once

#include "ggml-cpu.h"
#include "nlohmann/json.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using json = nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr int VERSION = 1;  // RUNNER in edgeft/bench/devices/job.py

struct Failure : std::runtime_error {
  std::string hint;
  explicit Failure(const std::string& text, std::string hint = "") : std::runtime_error(text), hint(std::move(hint)) {}
};

inline std::string why() { return std::strerror(errno); }

inline double now_s() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

inline std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The number in a file of /sys times `scale`, or null where it cannot be read.
inline json number_in(const fs::path& path, double scale = 1) {
  const std::string line = first_line(path);
  char* end = nullptr;
  const double value = std::strtod(line.c_str(), &end);
  return end == line.c_str() ? json() : json(value * scale);
}

// Entries of a folder whose name starts with `start`, in order; none where it cannot be listed.
inline std::vector<fs::path> entries(const fs::path& folder, const std::string& start) {
  std::vector<fs::path> found;
  std::error_code failed;
  for (fs::directory_iterator at(folder, failed), end; !failed && at != end; at.increment(failed))
    if (at->path().filename().string().rfind(start, 0) == 0) found.push_back(at->path());
  std::sort(found.begin(), found.end());
  return found;
}

// Clock of each group of cores in MHz.
inline json clocks_mhz() {
  json found = json::object();
  for (const auto& policy : entries("/sys/devices/system/cpu/cpufreq", "policy"))
    found[policy.filename().string()] = number_in(policy / "scaling_cur_freq", 1e-3);
  return found;
}

// Thermal zones in degrees C. Sensors that are switched off tell values that no phone survives: left out.
inline json zones_c() {
  json found = json::object();
  for (const auto& zone : entries("/sys/class/thermal", "thermal_zone")) {
    const json degrees = number_in(zone / "temp", 1e-3);
    if (degrees.is_number() && degrees > 0.0 && degrees < 150.0)
      found[zone.filename().string() + " " + first_line(zone / "type")] = degrees;
  }
  return found;
}

inline json largest(const json& values) {
  json found;
  for (const auto& value : values)
    if (value.is_number() && (found.is_null() || value > found)) found = value;
  return found;
}

// CPU seconds of all processes, as psutil counts them: user, nice, system, irq, softirq, steal.
inline json busy_s() {
  std::ifstream file("/proc/stat");
  std::string word;
  double part[8] = {};
  if (!(file >> word)) return json();
  for (double& ticks : part) file >> ticks;
  const double sum = part[0] + part[1] + part[2] + part[5] + part[6] + part[7];
  return file ? json(sum / static_cast<double>(sysconf(_SC_CLK_TCK))) : json();
}

inline json load_average() {
  std::ifstream file("/proc/loadavg");
  double one, five, fifteen;
  return file >> one >> five >> fifteen ? json{one, five, fifteen} : json();
}

// The state of the machine now: edgeft.bench.conditions.Moment.
inline json look() {
  timespec own{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
  return {{"wall_s", now_s()},
          {"own_s", static_cast<double>(own.tv_sec) + 1e-9 * static_cast<double>(own.tv_nsec)},
          {"busy_s", busy_s()},
          {"frequency_mhz", largest(clocks_mhz())},
          {"temperature_c", largest(zones_c())},
          {"load_average", load_average()}};
}

// What is kept of the time between two repeats: clocks, heat, and the battery's gauge.
inline json trace() {
  const fs::path battery = "/sys/class/power_supply/battery";
  return {{"wall_s", now_s()},
          {"clocks_mhz", clocks_mhz()},
          {"zones_c", zones_c()},
          {"current_ua", number_in(battery / "current_now")},
          {"voltage_uv", number_in(battery / "voltage_now")}};
}

inline json cpu_features() {
  const std::pair<const char*, int> known[] = {{"neon", ggml_cpu_has_neon()},
                                               {"fp16", ggml_cpu_has_fp16_va()},
                                               {"dotprod", ggml_cpu_has_dotprod()},
                                               {"i8mm", ggml_cpu_has_matmul_int8()},
                                               {"sve", ggml_cpu_has_sve()},
                                               {"sme", ggml_cpu_has_sme()},
                                               {"avx", ggml_cpu_has_avx()},
                                               {"avx2", ggml_cpu_has_avx2()},
                                               {"fma", ggml_cpu_has_fma()},
                                               {"f16c", ggml_cpu_has_f16c()},
                                               {"avx512", ggml_cpu_has_avx512()},
                                               {"avx512_vnni", ggml_cpu_has_avx512_vnni()},
                                               {"avx512_bf16", ggml_cpu_has_avx512_bf16()}};
  json names = json::array();
  for (const auto& [name, has] : known)
    if (has) names.push_back(name);
  return names;
}

inline json version() {
#if defined(__aarch64__)
  const char* arch = "aarch64";
#elif defined(__x86_64__)
  const char* arch = "x86_64";
#else
  const char* arch = "other";
#endif
  return {{"runner", VERSION}, {"llama_cpp", LLAMA_CPP_VERSION}, {"arch", arch}, {"cpu_features", cpu_features()}};
}

inline json peak_rss_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::atoll(line.c_str() + 6) * 1024;
  return json();
}

// Threads started from here on stay on these cores.
inline void pin(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::string names;
  for (int cpu : cpus) {
    names += " " + std::to_string(cpu);
    if (cpu < 0 || cpu >= CPU_SETSIZE) throw Failure("there is no core with the number" + names);
    CPU_SET(cpu, &set);
  }
  if (sched_setaffinity(0, sizeof set, &set) != 0)
    throw Failure("cannot stay on the cores" + names + ": " + why(), "name cores that the device has and lets apps use");
}

