// A node server: server.js PORT [SECONDS]
const delay = Number(process.argv[3] || 0) * 1000
require('http').createServer((request, response) => {
  if (delay) setTimeout(() => response.end('hello\n'), delay)
  else response.end('hello\n')
}).listen(Number(process.argv[2]))
