// expect: more than 12
#pragma once

// more
// than
// a
// dozen
// lines,
// none
// of
// which
// says
// why
// there are so many
