/* adopt SHAPE PORT: an HTTP server whose sockets are made in the way that SHAPE names. Each answer is "hello SHAPE pid N listener N". */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

#ifdef SOCKETCALL
/* As an old libc does it on i386. */
static int sc(int call, long a, long b, long c, long d, long e) {
	long args[] = {a, b, c, d, e};
	return syscall(SYS_socketcall, call, args);
}
#define bind(fd, addr, len) sc(2, fd, (long)(addr), len, 0, 0)
#define listen(fd, n) sc(4, fd, n, 0, 0, 0)
#define setsockopt(fd, level, name, value, len) sc(14, fd, level, name, (long)(value), len)
#endif

static const char *shape;
static int port, fds[8], nfds;

static void die(const char *what) {
	perror(what);
	exit(1);
}

static int sock(int family, int protocol) {
	int one = 1, s = socket(family, SOCK_STREAM, protocol);
	if (s < 0) die("socket");
	if (setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one)) die("SO_REUSEADDR");
	return s;
}

static int v6only(int s, int on) {
	if (setsockopt(s, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on)) die("IPV6_V6ONLY");
	return s;
}

static int try_bind(int s, int family, const char *host, int port) {
	if (family == AF_INET) {
		struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
		if (inet_pton(AF_INET, host, &a.sin_addr) != 1) die("inet_pton");
		return bind(s, (struct sockaddr *)&a, sizeof a);
	}
	struct sockaddr_in6 a = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
	if (inet_pton(AF_INET6, host, &a.sin6_addr) != 1) die("inet_pton");
	return bind(s, (struct sockaddr *)&a, sizeof a);
}

static int bound(int s, int family, const char *host, int port) {
	if (try_bind(s, family, host, port)) die("bind");
	return s;
}

static int listening(int s) {
	if (listen(s, 64)) die("listen");
	fds[nfds++] = s;
	return s;
}

static int v4(const char *host, int port) { return listening(bound(sock(AF_INET, 0), AF_INET, host, port)); }

static int bound_port(int s) {
	struct sockaddr_in a;
	socklen_t len = sizeof a;
	if (getsockname(s, (struct sockaddr *)&a, &len)) die("getsockname");
	return ntohs(a.sin_port);
}

/* One request a connection. */
static void answer(int s) {
	char request[4096], body[256], response[512];
	int c = accept4(s, NULL, NULL, SOCK_CLOEXEC), n, have = 0, i;
	if (c < 0) {
		if (errno == EAGAIN || errno == ECONNABORTED || errno == EINTR) return;
		die("accept");
	}
	while (have < (int)sizeof request - 1 && (n = read(c, request + have, sizeof request - 1 - have)) > 0) {
		request[have += n] = 0;
		if (strstr(request, "\r\n\r\n")) break;
	}
	for (i = 0; i < nfds && fds[i] != s; i++);
	n = snprintf(body, sizeof body, "hello %s pid %d listener %d\n", shape, getpid(), i);
	n = snprintf(response, sizeof response, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", n, body);
	if (have > 0 && write(c, response, n) != n) perror("write");
	shutdown(c, SHUT_WR);
	close(c);
}

static void serve_epoll(int e) {
	for (;;) {
		struct epoll_event ev;
		int n = epoll_wait(e, &ev, 1, -1);
		if (n < 0 && errno != EINTR) die("epoll_wait");
		if (n > 0) answer(ev.data.fd);
	}
}

static void serve(void) {
	int e = epoll_create1(0), i;
	for (i = 0; i < nfds; i++) {
		struct epoll_event ev = {.events = EPOLLIN, .data.fd = fds[i]};
		if (epoll_ctl(e, EPOLL_CTL_ADD, fds[i], &ev)) die("epoll_ctl");
	}
	serve_epoll(e);
}

#define IS(name) (!strcmp(shape, name))

int main(int argc, char **argv) {
	int s, one = 1;
	if (argc != 3) return 2;
	shape = argv[1], port = atoi(argv[2]);
	signal(SIGPIPE, SIG_IGN);
	if (IS("ipv4")) {
		v4("127.0.0.1", port);
	} else if (IS("wildcard")) {
		v4("0.0.0.0", port);
	} else if (IS("ipv6")) {
		listening(bound(sock(AF_INET6, 0), AF_INET6, "::1", port));
	} else if (IS("v6only")) {
		listening(bound(v6only(sock(AF_INET6, 0), 1), AF_INET6, "::", port));
	} else if (IS("dual-stack")) {
		listening(bound(v6only(sock(AF_INET6, 0), 0), AF_INET6, "::", port));
	} else if (IS("v4-mapped")) {
		listening(bound(v6only(sock(AF_INET6, 0), 0), AF_INET6, "::ffff:127.0.0.1", port));
	} else if (IS("two forms")) {
		v4("0.0.0.0", port);
		listening(bound(v6only(sock(AF_INET6, 0), 1), AF_INET6, "::", port));
	} else if (IS("two ports")) {
		v4("127.0.0.1", port);
		v4("127.0.0.1", port + 10000);
	} else if (IS("reuseport")) {
		for (int i = 0; i < 4; i++) {
			s = sock(AF_INET, 0);
			if (setsockopt(s, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one)) die("SO_REUSEPORT");
			listening(bound(s, AF_INET, "127.0.0.1", port));
		}
	} else if (IS("fork")) {
		v4("127.0.0.1", port);
		for (int i = 0; i < 3; i++)
			if (fork() == 0) serve();
		for (;;) pause();
	} else if (IS("setuid")) {
		if (setgid(65533) || setuid(65533)) die("setuid");
		v4("127.0.0.1", port);
	} else if (IS("epoll first")) {
		int e = epoll_create1(EPOLL_CLOEXEC);
		s = sock(AF_INET, 0);
		struct epoll_event ev = {.events = EPOLLIN, .data.fd = s};
		if (epoll_ctl(e, EPOLL_CTL_ADD, s, &ev)) die("epoll_ctl");
		listening(bound(s, AF_INET, "127.0.0.1", port));
		serve_epoll(e);
	} else if (IS("mptcp")) {
		listening(bound(sock(AF_INET, IPPROTO_MPTCP), AF_INET, "127.0.0.1", port));
	} else if (IS("mptcp epoll first")) {
		int e = epoll_create1(EPOLL_CLOEXEC);
		s = sock(AF_INET6, IPPROTO_MPTCP);
		struct epoll_event ev = {.events = EPOLLIN, .data.fd = s};
		if (epoll_ctl(e, EPOLL_CTL_ADD, s, &ev)) die("epoll_ctl");
		listening(bound(s, AF_INET6, "::", port));
		serve_epoll(e);
	} else if (IS("others untouched")) {
		int u = socket(AF_INET, SOCK_DGRAM, 0), free;
		/* UDP, of which another generation may have the port, so it shares it; the same number as the TCP port. */
		if (setsockopt(u, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one)) die("SO_REUSEPORT");
		bound(u, AF_INET, "127.0.0.1", port);
		free = bound(sock(AF_INET, 0), AF_INET, "127.0.0.1", 0);
		if (listen(free, 1)) die("listen");
		if (bound_port(u) != port || bound_port(free) == 0) die("getsockname");
		v4("127.0.0.1", port);
	} else if (IS("listen twice")) {
		s = v4("127.0.0.1", port);
		if (listen(s, 128)) die("listen again");
	} else if (IS("bind twice")) {
		v4("127.0.0.1", port);
		if (try_bind(sock(AF_INET, 0), AF_INET, "127.0.0.1", port) == 0 || errno != EADDRINUSE) die("the same address should be in use, but");
		if (try_bind(sock(AF_INET, 0), AF_INET, "0.0.0.0", port) == 0 || errno != EADDRINUSE) die("every address should be in use, but");
		if (try_bind(fds[0], AF_INET, "127.0.0.1", port + 10000) == 0 || errno != EINVAL) die("a bound socket should not be bound again, but");
	} else if (IS("bind again")) {
		s = v4("127.0.0.1", port);
		close(s);
		nfds = 0;
		v4("127.0.0.1", port);
	} else if (IS("bind and go")) {
		/* A socket that is bound and closed without ever listening. */
		close(bound(sock(AF_INET, 0), AF_INET, "127.0.0.1", port));
		v4("127.0.0.1", port);
	} else {
		fprintf(stderr, "no shape %s\n", shape);
		return 2;
	}
	serve();
}
