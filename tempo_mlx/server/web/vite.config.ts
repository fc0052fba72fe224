/// <reference types="vitest/config" />
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig, loadEnv } from 'vite'
import { singleFile } from './build/single-file.ts'

// The same variables as the server's, from the environment or the repository's .env.
const { API_PORT = '8000', FRONTEND_PORT = '5173' } = loadEnv('', '../../..', '')
const api = `http://127.0.0.1:${API_PORT}`
const ROUTES = ['settings', 'health', 'generate', 'sessions', 'requests', 'docs', 'openapi.json']

export default defineConfig({
  base: './',
  plugins: [svelte(), singleFile()],
  build: {
    target: 'es2022',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rolldownOptions: { output: { codeSplitting: false } },
  },
  server: {
    port: Number(FRONTEND_PORT),
    strictPort: true,
    proxy: Object.fromEntries(ROUTES.map((route) => [`/${route}`, api])),
  },
  test: { include: ['src/**/*.test.ts'], environment: 'node' },
})
