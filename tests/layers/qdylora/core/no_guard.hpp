// expect: has no #pragma once

struct NoGuard {};
