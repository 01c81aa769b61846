// edgeft-runner MODEL.gguf JOB.json OUT.json: measure one model on the machine that this program runs on.
//
// The job and what is written are those of edgeft/bench/devices/job.py; the rules of timing, scoring and answering those
// of edgeft/bench/{speed,accuracy,llamacpp}.py. Exit codes: 0 done; 2 a problem with a reason, which OUT.json tells.
#include "machine.hpp"
#include "model.hpp"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <new>

namespace {

constexpr int BAD_INPUT = 2;
constexpr int MIN_CONTEXT = 512, WARM_UP_STEPS = 4, MAX_WARM_UPS = 6;
constexpr double STEADY = 0.03;

void progress(const char* what, size_t total, size_t done) {
  std::printf("%s\n", json{{"what", what}, {"total", total}, {"done", done}}.dump().c_str());
  std::fflush(stdout);
}

// ---- speed ----

// One answer, past stop tokens. The first token is the prefill's and counts for the time to first token alone.
json repeat(Context& context, const Model& model, const Ids& prompt, int decode_tokens) {
  context.keep(0);
  const float* logits = nullptr;
  const double start = now_s();
  context.feed(prompt, static_cast<int>(prompt.size()) - 1, [&](int, const float* found) { logits = found; });
  const double prefilled = now_s();
  llama_token token = model.likeliest(logits);
  const double chosen = now_s();
  std::vector<double> steps;
  double mark = chosen;
  for (int i = 0; i < decode_tokens; i++) {
    token = context.step(token);
    const double now = now_s();
    steps.push_back(now - mark);
    mark = now;
  }
  return {{"prompt_tokens", prompt.size()},
          {"prefill_s", prefilled - start},
          {"choose_s", chosen - prefilled},
          {"decode_s", steps}};
}

double taken_s(const json& sample) {
  double sum = sample["prefill_s"];
  for (double step : sample["decode_s"]) sum += step;
  return sum;
}

void time_speed(const Model& model, const json& speed, int threads, json& out) {
  const Ids prompt = model.ids_of(speed.at("prompt"), "the prompt to time");
  const int decode_tokens = speed.at("decode_tokens");
  const size_t repeats = speed.at("repeats");
  if (prompt.empty() || decode_tokens < 0) throw Failure("a prompt to time needs a token, and no fewer than 0 steps");
  const int room = static_cast<int>(prompt.size()) + std::max(decode_tokens, WARM_UP_STEPS) + 1;
  Context context(model, std::max(MIN_CONTEXT, room), threads);
  int warm_ups = 0;
  double last = std::numeric_limits<double>::infinity();
  while (warm_ups++ < MAX_WARM_UPS) {
    const double taken = taken_s(repeat(context, model, prompt, std::min(decode_tokens, WARM_UP_STEPS)));
    if (taken > (1 - STEADY) * last) break;
    last = taken;
  }
  out["warm_ups"] = std::min(warm_ups, MAX_WARM_UPS);
  while (out["samples"].size() < repeats) {
    out["samples"].push_back(repeat(context, model, prompt, decode_tokens));
    out["trace"].push_back(trace());
    progress("speed", repeats, out["samples"].size());
  }
}

// ---- answers and scores ----

// Log-probability of `token`, the likeliest token, and its log-probability; sums in float64.
class Scores {
 public:
  void add(const Model& model, const float* logits, const llama_token* token) {
    const llama_token best = model.likeliest(logits);
    double sum = 0;
    for (int i = 0; i < model.vocab_size; i++) sum += std::exp(static_cast<double>(logits[i] - logits[best]));
    const double log_sum = std::log(sum) + logits[best];
    next_.push_back(token ? json(logits[*token] - log_sum) : json());
    argmax_.push_back(best);
    top_.push_back(logits[best] - log_sum);
  }
  json as_json() const { return {{"next_logprob", next_}, {"argmax", argmax_}, {"top_logprob", top_}}; }

 private:
  json next_ = json::array(), argmax_ = json::array(), top_ = json::array();
};

// The greedy answer after `prompt`, with `reference` as its draft: what the model says itself is kept (speculative
// decoding, Leviathan et al. 2023, arXiv:2211.17192), and the draft's tokens are scored on the way.
Ids answer(Context& context, const Model& model, const Ids& prompt, const Ids& reference, const Ids& stops, size_t most,
           Scores& scores) {
  const auto stop = [&](llama_token token) { return std::find(stops.begin(), stops.end(), token) != stops.end(); };
  const int asked = static_cast<int>(prompt.size());
  Ids whole = prompt, own;
  whole.insert(whole.end(), reference.begin(), reference.end());
  if (!reference.empty() && stop(reference.back())) whole.pop_back();  // nothing follows a stop token
  context.keep_common(prompt, asked - 1);
  bool agreed = true;
  context.feed(whole, asked - 1, [&](int position, const float* logits) {
    const size_t at = position + 1 - asked;
    if (at < reference.size()) scores.add(model, logits, &reference[at]);
    if (agreed) own.push_back(model.likeliest(logits));
    agreed = agreed && position + 1 < static_cast<int>(whole.size()) && own.back() == whole[position + 1];
  });
  Ids said;
  for (llama_token token : own) {
    if (stop(token) || said.size() == most) return said;
    said.push_back(token);
  }
  context.keep(asked + static_cast<int>(said.size()) - 1);
  while (said.size() < most && !context.full()) {
    const llama_token token = context.step(said.back());
    if (stop(token)) break;
    said.push_back(token);
  }
  return said;
}

void answer_rows(Context& context, const Model& model, const json& job, json& out) {
  const Ids stops = job.at("stop_ids").get<Ids>();
  const size_t most = job.at("max_new_tokens"), total = job.at("rows").size();
  for (const json& row : job.at("rows")) {
    const Ids prompt = model.ids_of(row.at("prompt"), "a prompt");
    const Ids reference = model.ids_of(row.value("reference", json::array()), "a reference");
    if (prompt.empty()) throw Failure("a row has no prompt");
    Scores scores;
    out["answers"].push_back(answer(context, model, prompt, reference, stops, most, scores));
    out["references"].push_back(scores.as_json());
    progress("answers", total, out["answers"].size());
  }
}

// The wanted positions of a teacher-forced row; their logits go to `raw` as float32 [P, V].
json force(Context& context, const Model& model, const json& row, std::FILE* raw) {
  const Ids ids = model.ids_of(row.at("ids"), "a forced row");
  const auto wanted = row.at("positions").get<std::vector<int>>();
  const auto is_wrong = [&](size_t i) { return wanted[i] < (i ? wanted[i - 1] + 1 : 0) || wanted[i] >= (int)ids.size(); };
  for (size_t i = 0; i < wanted.size(); i++)
    if (is_wrong(i)) throw Failure("the positions of a forced row must rise and lie inside it");
  Scores scores;
  if (wanted.empty()) return scores.as_json();
  context.keep_common(ids, wanted.front());
  context.feed(Ids(ids.begin(), ids.begin() + wanted.back() + 1), wanted.front(), [&](int position, const float* logits) {
    if (!std::binary_search(wanted.begin(), wanted.end(), position)) return;
    scores.add(model, logits, position + 1 < static_cast<int>(ids.size()) ? &ids[position + 1] : nullptr);
    if (raw && std::fwrite(logits, sizeof(float), model.vocab_size, raw) != static_cast<size_t>(model.vocab_size))
      throw Failure("cannot write the logits: " + why(), "free space on the device");
  });
  return scores.as_json();
}

void force_rows(Context& context, const Model& model, const json& job, json& out) {
  const json name = job.value("logits", json());
  const std::string path = name.is_null() ? "" : name.get<std::string>(), partial = path + ".partial";
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> raw(path.empty() ? nullptr : std::fopen(partial.c_str(), "wb"),
                                                      std::fclose);
  if (!path.empty() && !raw) throw Failure("cannot write " + partial + ": " + why());
  for (const json& row : job.at("forced")) {
    out["forced"].push_back(force(context, model, row, raw.get()));
    progress("forced", job.at("forced").size(), out["forced"].size());
  }
  if (raw && (std::fclose(raw.release()) != 0 || std::rename(partial.c_str(), path.c_str()) != 0))
    throw Failure("cannot write " + path + ": " + why(), "free space on the device");
}

// ---- the program ----

json read_job(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Failure("cannot read " + path + ": " + why());
  json job = json::parse(file);
  if (job.value("runner", 0) != VERSION)
    throw Failure("the job is not of version " + std::to_string(VERSION), "make the runner and the job with one edgeft");
  return job;
}

json run(const std::string& model_path, const std::string& job_path) {
  const json job = read_job(job_path);
  const int threads = job.at("threads"), context_tokens = job.at("context");
  if (threads < 1 || threads > GGML_MAX_N_THREADS) throw Failure("cannot use " + std::to_string(threads) + " threads");
  if (context_tokens < 1) throw Failure("a context needs at least one token");
  const json cpus = job.value("cpus", json());
  if (!cpus.is_null()) pin(cpus.get<std::vector<int>>());
  llama_log_set(keep_log, nullptr);
  llama_backend_init();
  json out = version();
  out["runtime"] = "llama.cpp";
  out["build"] = std::string("llama-cpp-python ") + LLAMA_CPP_VERSION + ": " + llama_print_system_info();
  for (const char* part : {"samples", "trace", "answers", "references", "forced"}) out[part] = json::array();
  const double start = now_s();
  const Model model(model_path);
  out["load_s"] = now_s() - start;
  out["warm_ups"] = 0;
  out["before"] = look();
  const json speed = job.value("speed", json());
  if (!speed.is_null()) time_speed(model, speed, threads, out);
  out["after"] = look();
  out["peak_rss_bytes"] = peak_rss_bytes();
  out["peak_rss"] = "VmHWM of the process after the speed part";
  if (job.at("rows").empty() && job.at("forced").empty()) return out;
  Context context(model, context_tokens, threads);
  answer_rows(context, model, job, out);
  force_rows(context, model, job, out);
  return out;
}

json error(const std::string& message, const std::string& hint = "") {
  return {{"runner", VERSION}, {"error", {{"message", message}, {"hint", hint}}}};
}

json run_or_error(const char* model, const char* job) {
  try {
    return run(model, job);
  } catch (const Failure& failure) {
    return error(failure.what(), failure.hint);
  } catch (const json::exception& wrong) {
    return error(std::string(job) + " is no job: " + wrong.what());
  } catch (const std::bad_alloc&) {
    return error("there is not enough memory", "take a smaller type, or end other programs there");
  }
}

bool write_whole(const std::string& path, const std::string& text) {
  const std::string partial = path + ".partial";
  std::FILE* file = std::fopen(partial.c_str(), "wb");
  if (!file) return false;
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  return std::fclose(file) == 0 && written && std::rename(partial.c_str(), path.c_str()) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--version") {
    std::printf("%s\n", version().dump().c_str());
    return 0;
  }
  if (argc != 4) {
    std::fprintf(stderr, "usage: edgeft-runner MODEL.gguf JOB.json OUT.json | --version\n");
    return BAD_INPUT;
  }
  const json out = run_or_error(argv[1], argv[2]);
  const bool failed = out.contains("error");
  if (failed) std::fprintf(stderr, "edgeft-runner: %s\n", out["error"]["message"].get<std::string>().c_str());
  if (!write_whole(argv[3], out.dump(-1, ' ', false, json::error_handler_t::replace))) {
    std::fprintf(stderr, "edgeft-runner: cannot write %s: %s\n", argv[3], why().c_str());
    return BAD_INPUT;
  }
  return failed ? BAD_INPUT : 0;
}
