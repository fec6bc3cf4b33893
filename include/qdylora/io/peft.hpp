// LoRA adapters in Hugging Face PEFT's folders: save_peft_adapter, load_peft_adapter, assign.
#pragma once

#include <qdylora/io/peft_load.hpp>
#include <qdylora/io/peft_save.hpp>
