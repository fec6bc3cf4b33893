#pragma once

#include <qdylora/io/good.hpp>
