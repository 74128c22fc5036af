// Work that has V8 compile, deoptimize and collect: prints one line a part. The same under --jitless, which compiles nothing.
'use strict';

let seed = 1;
const random = () => (seed = (seed * 1103515245 + 12345) & 0x7fffffff);

const parts = {
    integers() {
        let hash = 0x811c9dc5;
        for (let i = 0; i < 300000; i++) hash = Math.imul(hash ^ (i & 0xff), 0x01000193) >>> 0;
        return hash;
    },
    floats() {
        const size = 60, u = new Float64Array(size).fill(1), v = new Float64Array(size);
        const a = (i, j) => 1 / (((i + j) * (i + j + 1)) / 2 + i + 1);
        const times = (from, to) => {
            for (let i = 0; i < size; i++) {
                to[i] = 0;
                for (let j = 0; j < size; j++) to[i] += a(i, j) * from[j];
            }
        };
        for (let i = 0; i < 20; i++) times(u, v), times(v, u);
        return Math.sqrt(u[0] / v[0]).toString();
    },
    typedArrays() {
        const bytes = new Uint8ClampedArray(4096), words = new Int16Array(bytes.buffer);
        for (let i = 0; i < 100000; i++) {
            bytes[i & 4095] = i * 1.7;
            words[(i * 7) & 2047] ^= i;
        }
        return words.reduce((sum, word) => (sum * 31 + word) | 0, 0);
    },
    // Code for small integers meets fractions, then strings.
    deoptimization() {
        const add = (x, y) => x + y;
        let result = '';
        for (let round = 0; round < 20; round++) {
            let sum = 0;
            for (let i = 0; i < 5000; i++) sum = add(sum, i);
            for (let i = 0; i < 100; i++) sum = add(sum, 0.5);
            result = add(result, `${sum};`);
        }
        return result.length + result.slice(-12);
    },
    objects() {
        class Node { constructor(key) { this.key = key; this.left = this.right = null; } }
        let root = null, depth = 0;
        for (let i = 0; i < 20000; i++) {
            const node = new Node(random());
            let at = root, level = 0;
            if (!root) { root = node; continue; }
            for (;;) {
                level++;
                const side = node.key < at.key ? 'left' : 'right';
                if (!at[side]) { at[side] = node; break; }
                at = at[side];
            }
            depth = Math.max(depth, level);
        }
        return depth;
    },
    shapes() {
        let sum = 0;
        for (let i = 0; i < 30000; i++) {
            const object = {};
            for (let j = 0; j < i % 9; j++) object['p' + j] = j;
            sum += Object.keys(object).length + (object.p3 ?? 7);
        }
        return sum;
    },
    text() {
        let text = '';
        for (let i = 0; i < 4000; i++) text += String.fromCharCode(97 + (random() >> 8) % 26) + (i % 9 ? '' : ' ');
        const words = text.match(/\b[a-m]\w*[n-z]\b/g).length;
        return words + JSON.stringify(JSON.parse(JSON.stringify(text.split(' ')))).length + text.replace(/(.)(.)/g, '$2$1').slice(0, 8);
    },
    numbersAsText() {
        let sum = 0;
        for (let i = 1; i < 20000; i++) sum += parseFloat((1 / i).toString()) === 1 / i ? 1 : 0;
        return sum;
    },
    bigIntegers() {
        let product = 1n;
        for (let i = 1n; i <= 400n; i++) product *= i;
        return (product % 1000000007n ** 3n).toString();
    },
    collections() {
        const map = new Map(), set = new Set();
        for (let i = 0; i < 50000; i++) {
            const key = random() % 5000;
            map.set(key, (map.get(key) ?? 0) + 1);
            set.add(String(key));
        }
        return [...map.values()].sort((a, b) => b - a)[0] + ' ' + set.size;
    },
    generators() {
        function* numbers(n) { for (let i = 0; i < n; i++) yield i * i; }
        let sum = 0;
        for (let round = 0; round < 50; round++) for (const number of numbers(1000)) sum += number;
        return sum;
    },
    exceptions() {
        let caught = 0;
        for (let i = 0; i < 20000; i++) {
            try { if (i % 3 === 0) throw new Error(i); null.x; } catch (error) { caught += error instanceof TypeError ? 1 : 2; }
        }
        return caught;
    },
};

for (const [name, part] of Object.entries(parts)) {
    seed = 1;
    let result;
    for (let round = 0; round < 5; round++) {
        seed = 1;
        const next = part();
        if (round && next !== result) throw new Error(`${name}: ${next} after ${result}`);
        result = next;
    }
    console.log(name, result);
}
