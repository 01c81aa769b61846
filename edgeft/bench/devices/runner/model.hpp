// llama.cpp's model and KV cache, freed with the objects that hold them.
#pragma once

#include "llama.h"
#include "machine.hpp"

using Ids = std::vector<llama_token>;

constexpr int CELLS = 256;          // llama.cpp makes room for tokens in these units
constexpr int BATCH_TOKENS = 2048;  // most tokens of one llama_decode call

inline std::string last_log;

inline void keep_log(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) last_log = text;
  while (!last_log.empty() && last_log.back() == '\n') last_log.pop_back();
}

struct Model {
  llama_model* pointer;
  int vocab_size;

  explicit Model(const std::string& path) {
    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    pointer = llama_model_load_from_file(path.c_str(), params);
    if (!pointer) throw Failure("llama.cpp cannot load " + path + ": " + last_log, "export the package again");
    vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(pointer));
  }
  ~Model() { llama_model_free(pointer); }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  Ids ids_of(const json& value, const char* what) const {
    Ids ids = value.get<Ids>();
    for (llama_token id : ids)
      if (id < 0 || id >= vocab_size)
        throw Failure(std::string(what) + " holds the token " + std::to_string(id) + "; the model has " +
                          std::to_string(vocab_size),
                      "tokenise with the package's own tokenizer");
    return ids;
  }

  llama_token likeliest(const float* logits) const {
    return static_cast<llama_token>(std::max_element(logits, logits + vocab_size) - logits);
  }
};

// One KV cache for one sequence, with threads that live as long as it does.
class Context {
 public:
  Context(const Model& model, int tokens, int threads)
      : model_(model), longest_(tokens), cells_((tokens + CELLS - 1) / CELLS * CELLS) {
    auto params = llama_context_default_params();
    params.n_ctx = cells_;
    params.n_seq_max = 1;
    params.kv_unified = true;
    params.n_batch = std::min(cells_, BATCH_TOKENS);
    params.n_outputs_max_per_seq = 0;
    params.n_threads = params.n_threads_batch = threads;
    pointer_ = llama_init_from_model(model.pointer, params);
    if (!pointer_)
      throw Failure("llama.cpp cannot make a context of " + std::to_string(cells_) + " tokens: " + last_log,
                    "shorten the rows, or end other programs there");
    auto pool = ggml_threadpool_params_default(threads);
    pool_ = ggml_threadpool_new(&pool);  // without one, ggml starts its threads anew for every token
    llama_attach_threadpool(pointer_, pool_, pool_);
  }
  ~Context() {
    llama_free(pointer_);
    ggml_threadpool_free(pool_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  int past() const { return static_cast<int>(fed_.size()); }
  bool full() const { return past() >= longest_; }

  // Forget all but the tokens that `ids` begins with too, `most` at the most.
  void keep_common(const Ids& ids, int most) {
    int same = 0;
    for (most = std::min({most, past(), static_cast<int>(ids.size())}); same < most && fed_[same] == ids[same];) same++;
    keep(same);
  }

  void keep(int count) {
    const auto memory = llama_get_memory(pointer_);
    if (count == 0) {
      llama_memory_clear(memory, false);
    } else if (!llama_memory_seq_rm(memory, 0, count, -1)) {  // a model whose state cannot be cut begins anew
      throw Failure("this model's state cannot be taken back to an earlier token", "measure it on this machine");
    }
    fed_.resize(count);
  }

  // Feed what `ids` has beyond the tokens that are there; `hear(position, logits)` for positions from `from` on.
  template <typename Hear>
  void feed(const Ids& ids, int from, Hear hear) {
    const int end = static_cast<int>(ids.size());
    if (end > longest_)
      throw Failure("a row needs " + std::to_string(end) + " tokens; the job's context is " + std::to_string(longest_),
                    "shorten the row or ask for a larger context");
    while (past() < end) {
      const int start = past(), size = std::min(BATCH_TOKENS, end - start);
      llama_batch batch = llama_batch_init(size, 0, 1);
      batch.n_tokens = size;
      for (int i = 0; i < size; i++) {
        batch.token[i] = ids[start + i];
        batch.pos[i] = start + i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = start + i >= from;
      }
      const int status = llama_decode(pointer_, batch);
      llama_batch_free(batch);
      if (status != 0) throw Failure("llama_decode failed with " + std::to_string(status) + ": " + last_log);
      fed_.insert(fed_.end(), ids.begin() + start, ids.begin() + start + size);
      for (int i = std::max(0, from - start); i < size; i++) hear(start + i, llama_get_logits_ith(pointer_, i));
    }
  }

  // Feed one token; the likeliest next one.
  llama_token step(llama_token token) {
    batch_of_one_ = token;
    const int status = llama_decode(pointer_, llama_batch_get_one(&batch_of_one_, 1));
    if (status != 0) throw Failure("llama_decode failed with " + std::to_string(status) + ": " + last_log);
    fed_.push_back(token);
    return model_.likeliest(llama_get_logits_ith(pointer_, 0));
  }

 private:
  const Model& model_;
  int longest_, cells_;
  Ids fed_;
  llama_token batch_of_one_ = 0;
  llama_context* pointer_ = nullptr;
  ggml_threadpool* pool_ = nullptr;
};

