#pragma once

#include <qdylora/backend.hpp>
