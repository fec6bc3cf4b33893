// The transformer, Llama and Falcon: shapes, blocks, decoder, several adapters mixed in a batch, generation, scores, tokenizer, recipes,
// and the models that files hold, to read and, where all weights trained, to write. Needs Eigen and nlohmann/json.
#pragma once

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/batch.hpp>
#include <qdylora/model/bleu.hpp>
#include <qdylora/model/bleu_difference.hpp>
#include <qdylora/model/calibrate.hpp>
#include <qdylora/model/chat.hpp>
#include <qdylora/model/chat_templates.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/drawn_base.hpp>
#include <qdylora/model/generate.hpp>
#include <qdylora/model/initial_weight.hpp>
#include <qdylora/model/load_gguf.hpp>
#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/mixed_decoder.hpp>
#include <qdylora/model/model_shape.hpp>
#include <qdylora/model/published_shapes.hpp>
#include <qdylora/model/rank_map.hpp>
#include <qdylora/model/rank_report.hpp>
#include <qdylora/model/recipe.hpp>
#include <qdylora/model/save_hugging_face.hpp>
#include <qdylora/model/saved_modules.hpp>
#include <qdylora/model/score.hpp>
#include <qdylora/model/tokenizer.hpp>
#include <qdylora/model/tokenizer_gguf.hpp>
#include <qdylora/model/tokenizer_json.hpp>
#include <qdylora/model/trainer.hpp>
