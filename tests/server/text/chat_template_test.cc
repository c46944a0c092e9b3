#include "server/text/chat_template.h"

#include <gtest/gtest.h>

#include "server/base/strings.h"
#include "tests/server/text/chat_testlib.h"
#include "tests/server/text/tokenizer_testlib.h"

namespace altiplano::testing {
namespace {

// Llama 3's, as Hugging Face users know it; and the same laid out by another hand.
constexpr std::string_view kLlama3 =
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";
constexpr std::string_view kLlama3Otherwise =
    "{#- Llama 3 -#}\r\n{{- bos_token -}}\r\n{%- for m in messages -%}\r\n  {{- \"<|start_header_id|>\" + m.role + "
    "\"<|end_header_id|>\\n\\n\" -}}\r\n  {{- m.content|trim + \"<|eot_id|>\" -}}\r\n{%- endfor -%}\r\n"
    "{%- if add_generation_prompt -%}\r\n{{- \"<|start_header_id|>assistant<|end_header_id|>\\n\\n\" -}}\r\n{%- endif "
    "-%}\r\n";
constexpr std::string_view kSmolLm2 =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
constexpr std::string_view kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

std::string Replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string result(text);
  const size_t at = result.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? result : result.replace(at, from.size(), to);
}

std::string TinyTemplate() {
  return ReadFileIfPresent(SourcePath("tests/data/tiny/chat_template.jinja")).value();
}

TEST(ChatTemplateTest, RecognisesWhatItKnows) {
  EXPECT_EQ(RecogniseChatTemplate(kLlama3), "llama3");
  EXPECT_EQ(RecogniseChatTemplate(kLlama3Otherwise), "llama3");
  EXPECT_EQ(RecogniseChatTemplate(Replaced(kLlama3, " | trim", "")), "llama3-meta");
  EXPECT_EQ(RecogniseChatTemplate(StrCat("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = "
                                         "false %}{% endif %}",
                                         kChatMl)),
            "chatml");
  EXPECT_EQ(RecogniseChatTemplate(kSmolLm2), "smollm2");
  EXPECT_EQ(RecogniseChatTemplate(kChatMl), "chatml");
  EXPECT_EQ(RecogniseChatTemplate(Replaced(kChatMl, "'<|im_end|>' + '\\n'", "'<|im_end|>\\n'")), "chatml");
  EXPECT_EQ(RecogniseChatTemplate(TinyTemplate()), "llama3.1");
}

TEST(ChatTemplateTest, RecognisesTheReferenceTemplates) {
  const std::pair<const char*, const char*> known[] = {
      {"meta-llama-Llama-3.1-8B-Instruct", "llama3.1"},
      {"meta-llama-Llama-3.3-70B-Instruct", "llama3.1"},  // the same template
      {"meta-llama-Llama-3.2-3B-Instruct", "llama3.2"},
      {"vllm-tool_chat_template_llama3.1_json", "vllm-llama3.1-json"},
      {"vllm-tool_chat_template_llama3.2_json", "vllm-llama3.2-json"},
      {"vllm-tool_chat_template_llama3.2_pythonic", "vllm-llama3.2-pythonic"},
  };
  for (const auto& [file, format] : known) {
    const auto jinja = ReadFileIfPresent(DataPath(StrCat("templates/", file, ".jinja")));
    if (!jinja) GTEST_SKIP() << "no shared test data";
    EXPECT_EQ(RecogniseChatTemplate(*jinja), format) << file;
  }
}

TEST(ChatTemplateTest, LayoutDoesNotMatter) {
  std::string jinja = TinyTemplate();
  for (size_t at = jinja.find('\n'); at != std::string::npos; at = jinja.find('\n', at + 2)) jinja.insert(at, "\r");
  EXPECT_EQ(RecogniseChatTemplate(jinja), "llama3.1");
  EXPECT_EQ(RecogniseChatTemplate("{# Copyright of someone #}\n" + TinyTemplate() + "\n{# end #}"), "llama3.1");
  EXPECT_EQ(RecogniseChatTemplate(Replaced(TinyTemplate(), "only supports single tool-calls", "wants one call")),
            "llama3.1");
  EXPECT_EQ(RecogniseChatTemplate(Replaced(TinyTemplate(), "message['role'] +", "message.role  +")), "llama3.1");
}

// What changes the prompt must never pass for the original.
TEST(ChatTemplateTest, RefusesChangedTemplates) {
  const std::pair<const char*, const char*> changes[] = {
      {"Cutting Knowledge Date: December 2023", "Cutting Knowledge Date: March 2024"},
      {"\"26 Jul 2024\"", "\"27 Jul 2024\""},
      {"{{- system_message }}", "{{- \"Always rhyme.\" + system_message }}"},
      {"{{- system_message }}", "Rhyme. {{ system_message }}"},
      {"{{- system_message }}", "{{- system_message }}."},
      {"['content']|trim", "['content']"},
      {"tools_in_user_message = true", "tools_in_user_message = false"},
      {"\"<|eom_id|>\"", "\"<|eot_id|>\""},
      {"{{- bos_token }}", ""},
      {"{{- bos_token }}", "{{- bos_token }}{{- bos_token }}"},
      {"{%- if add_generation_prompt %}", "{%- if not add_generation_prompt %}"},
      {"{%- if add_generation_prompt %}", "{%- if false %}"},
      {"{%- if add_generation_prompt %}", "{%- if add_generation_prompt and tools %}"},
      {"for message in messages %}", "for message in messages|reverse %}"},
      {"for message in messages %}", "for message in messages[1:] %}"},
      {"messages[0]['content']|trim", "messages[0]['content'].strip()|trim"},
      {"{%- endif %}", "{%- endif "},
      {"\"<|python_tag|>\"", "\"<|python_tag|>"},
  };
  for (const auto& [from, to] : changes) {
    EXPECT_EQ(RecogniseChatTemplate(Replaced(TinyTemplate(), from, to)), "") << to;
  }
  EXPECT_EQ(RecogniseChatTemplate(Replaced(kLlama3, "bos_token + ", "")), "");
  EXPECT_EQ(RecogniseChatTemplate(StrCat(kLlama3, "{% if is_alice %}{{ 'Alice:' }}{% endif %}")), "");
  EXPECT_EQ(RecogniseChatTemplate(StrCat(kLlama3, "x")), "");
  EXPECT_EQ(RecogniseChatTemplate(Replaced(kSmolLm2, "SmolLM", "SmallLM")), "");
  EXPECT_EQ(RecogniseChatTemplate(StrCat("{{ bos_token }}", kChatMl)), "");
  for (const std::string_view junk : {"", "{{", "{%", "{#", "{{ '", "hello", "{{ '\\", "{% -%}", "{{{}}}"}) {
    EXPECT_EQ(RecogniseChatTemplate(junk), "") << junk;
  }
}

TEST(ChatTemplateTest, FindsWhatIsPrinted) {
  TemplateParts parts;
  ASSERT_TRUE(SplitTemplate("a {{ 'b\\n' + \"c'\" }}\n {%- if x == {'k': 'v'} %}\n  {% else %} d {# e #}{% endif %}\n",
                            &parts));
  EXPECT_EQ(parts.texts, (std::vector<std::string>{" d ", "a ", "b\n", "c'", "k", "v"}));
  EXPECT_EQ(parts.code, "{{'b\n'+'c''}}{%ifx=={'k':'v'}%}{%else%}{%endif%}");
}

TEST(ChatTemplateTest, UnknownTemplateNamesTheOption) {
  const auto format = ChatFormat::FromTemplate("{{ messages }}");
  ASSERT_EQ(format.status().code(), Code::kNotFound);
  EXPECT_NE(format.status().message().find("--chat-format"), std::string::npos) << format.status().message();
  for (const std::string_view name : ChatFormat::Names()) {
    EXPECT_NE(format.status().message().find(name), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace altiplano::testing
