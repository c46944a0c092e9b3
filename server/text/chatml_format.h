// ChatML: turns of "<|im_start|>role\n" content "<|im_end|>\n".
#pragma once

#include <memory>
#include <string_view>

#include "server/text/chat_format.h"

namespace altiplano {

// `default_system`: the system message of conversations that start without one; empty: none is added.
std::shared_ptr<const ChatFormat> MakeChatMlFormat(std::string_view name, std::string_view default_system);

}  // namespace altiplano
