import com.sun.net.httpserver.HttpExchange;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

/** The JDK's own HTTP server: HttpServer PORT [SECONDS]. */
public class HttpServer {
  public static void main(String[] args) throws Exception {
    long delay = args.length > 1 ? (long) (Double.parseDouble(args[1]) * 1000) : 0;
    var server = com.sun.net.httpserver.HttpServer.create(new InetSocketAddress(Integer.parseInt(args[0])), 0);
    server.setExecutor(Executors.newCachedThreadPool());
    server.createContext("/", (HttpExchange e) -> {
      try {
        if (delay > 0) Thread.sleep(delay);
      } catch (InterruptedException x) {
        Thread.currentThread().interrupt();
      }
      byte[] body = "hello\n".getBytes();
      e.sendResponseHeaders(200, body.length);
      e.getResponseBody().write(body);
      e.close();
    });
    server.start();
  }
}
