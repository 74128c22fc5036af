-- Primes, queens, strings and a float series: prints four lines that are known.
local composite, primes = {}, 0
for i = 2, 100000 do
    if not composite[i] then
        primes = primes + 1
        for j = i * i, 100000, i do composite[j] = true end
    end
end
print("primes", primes)

local function queens(row, n, columns, up, down)
    if row > n then return 1 end
    local found = 0
    for column = 1, n do
        if not (columns[column] or up[row + column] or down[row - column]) then
            columns[column], up[row + column], down[row - column] = true, true, true
            found = found + queens(row + 1, n, columns, up, down)
            columns[column], up[row + column], down[row - column] = nil, nil, nil
        end
    end
    return found
end
print("queens", queens(1, 8, {}, {}, {}))

local words = {}
for i = 1, 20000 do words[#words + 1] = string.format("%05x", i * 7919 % 65536) end
table.sort(words)
print("words", #table.concat(words), words[1], words[#words], (table.concat(words):gsub("f0", "")):len())

local pi = 0.0
for i = 0, 999999 do pi = pi + (i % 2 == 0 and 4 or -4) / (2 * i + 1) end
print("pi", string.format("%.12f", pi))
