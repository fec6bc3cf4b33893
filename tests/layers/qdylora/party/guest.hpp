// expect: there is no room 'party'
#pragma once

struct Guest {};
