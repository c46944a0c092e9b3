// Conversations for the tests of the chat formats, from the contexts that reference renderings were made from.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/text/chat_format.h"
#include "server/text/python_json.h"

namespace altiplano::testing {

// JSON lines with key order and numbers kept; empty when the file is absent.
std::vector<PyValue> ReadPyJsonLines(const std::string& path);
PyValue ReadPyJson(const std::string& path);
std::string SourcePath(std::string_view relative);  // in the repository
const std::string& TextOf(const PyValue& dict, std::string_view key);
std::vector<TokenId> IdsOf(const PyValue& dict, std::string_view key);

// A template's variables: messages, tools, custom_tools, builtin_tools, tools_in_user_message, date_string,
// add_generation_prompt, bos_token. Fails the test on any other. Arguments given as a string are taken as OpenAI's:
// the JSON text of the arguments.
Conversation FromContext(const PyValue& context);

ChatMessage System(std::string content);
ChatMessage User(std::string content);
ChatMessage Assistant(std::string content);
ChatMessage Calls(std::vector<ToolCall> calls);
ChatMessage Result(std::string content, std::string call_id = "");

std::shared_ptr<const ChatFormat> Format(std::string_view name);

// The ids that Hugging Face gives: special tokens of the vocabulary are found in the text wherever they are spelled.
std::vector<TokenId> EncodeWithSpecials(const Tokenizer& tokenizer, std::string_view text);

}  // namespace altiplano::testing
