// Which built-in format a checkpoint's Jinja chat template is. Templates are not run: one is recognised when every text
// in it is one that the format is known to use, and the few points of logic that tell formats apart are there. White
// space between tags, comments, quote characters and names of variables may differ; a changed word may not, because a
// fine-tune with another system prompt must not be served with ours.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace altiplano {

// The format's name, or "" when the template is unknown.
std::string_view RecogniseChatTemplate(std::string_view jinja);

// What recognition looks at; exposed for tests.
struct TemplateParts {
  std::vector<std::string> texts;  // string literals, unescaped, and text printed between tags; sorted, unique
  std::string code;                // the tags' insides without blanks and comments, literals as '...'
};
// False for malformed tags or literals.
bool SplitTemplate(std::string_view jinja, TemplateParts* parts);

}  // namespace altiplano
